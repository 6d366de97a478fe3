"""The drafts that can be trained, by algorithm, and reading one back from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipes.block import DFlashDraft, DSparkDraft
from recipes.draft import Draft
from recipes.recurrent import Eagle3Draft, MTPDraft

ALGORITHMS: dict[str, type[Draft]] = {draft.kind: draft for draft in (DSparkDraft, DFlashDraft, Eagle3Draft, MTPDraft)}


def load_draft(folder: Path) -> Draft:
    """A draft that `Draft.export` wrote, in float32."""
    hf = json.loads((folder / "config.json").read_text())
    hot = torch.tensor(json.loads((folder / "hot_vocab.json").read_text()))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for draft in ALGORITHMS.values():
        if hf["architectures"] == [draft.architecture]:
            return draft.from_checkpoint(hf, tensors, hot)
    raise SystemExit(f"error: {folder / 'config.json'}: architectures: {hf['architectures']} is none of the recipes'")
