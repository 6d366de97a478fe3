"""The drafts that can be trained, by algorithm, and reading one back from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipes.block import DFlashDraft, DSparkDraft
from recipes.draft import Draft
from recipes.recurrent import Eagle3Draft, MTPDraft

ARCHITECTURES: dict[str, type[Draft]] = {
    "Qwen3DSparkModel": DSparkDraft,
    "DFlashDraftModel": DFlashDraft,
    "LlamaForCausalLMEagle3": Eagle3Draft,
    "MiMoForCausalLM": MTPDraft,
}


def load_draft(folder: Path) -> Draft:
    """A draft that `Draft.export` wrote, in float32."""
    hf = json.loads((folder / "config.json").read_text())
    hot = torch.tensor(json.loads((folder / "hot_vocab.json").read_text()))
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    return ARCHITECTURES[hf["architectures"][0]].from_checkpoint(hf, tensors, hot)
