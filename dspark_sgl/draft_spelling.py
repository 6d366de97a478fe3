"""Released drafts spell their config in three ways; SGLang reads one of them everywhere. Never changes a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from .cache import cache_dir
from .draft_config import DraftError, read_draft_config, read_json


def as_sglang_reads_it(draft: Path) -> Path:
    """`draft` itself when its config is flat, else a cached folder of links to it with the config flattened."""
    raw = read_json(draft / "config.json")
    flat = {**raw, **read_draft_config(draft).flat()}
    if flat == raw:
        return draft
    text = json.dumps(flat, indent=1, sort_keys=True)
    folder = cache_dir("flat", hashlib.sha256(f"{draft.resolve()}\n{text}".encode()).hexdigest()[:16])
    try:
        _link(draft, folder, text)
    except OSError as error:
        raise DraftError.at(
            folder, f"cannot be written: {error.strerror}", "set XDG_CACHE_HOME to a folder that can"
        ) from None
    return folder


def _link(draft: Path, folder: Path, config: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        if file.name != "config.json":
            with contextlib.suppress(FileExistsError):  # made before, or by another process just now
                (folder / file.name).symlink_to(file.resolve())
    scratch = folder / f".config-{os.getpid()}"
    scratch.write_text(config)
    scratch.replace(folder / "config.json")
