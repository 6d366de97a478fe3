"""Released drafts spell their config in three ways; SGLang reads one of them everywhere. Never changes a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from .cache import cache_dir
from .draft_config import read_draft_config, read_json


def as_sglang_reads_it(draft: Path) -> Path:
    """`draft` itself when its config is flat, else a cached folder of links to it with the config flattened."""
    raw = read_json(draft / "config.json")
    flat = {**raw, **read_draft_config(draft).flat()}
    if flat == raw:
        return draft
    text = json.dumps(flat, indent=1, sort_keys=True)
    folder = cache_dir("flat", hashlib.sha256(f"{draft.resolve()}\n{text}".encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    scratch = folder / f".config-{os.getpid()}"
    scratch.write_text(text)
    scratch.replace(folder / "config.json")
    return folder
