"""Servers of the twelve-token target: the arguments they share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dspark_sgl.server import Server

from . import tiny_drafts


def tiny_server(
    folder: Path,
    *more: str,
    algorithm: str = "DSPARK_SGL",
    draft: str | None = "draft",
    environment: dict[str, str] | None = None,
) -> Server:
    """folder: has `target`, `draft` (None: none is needed) and `policy.yaml`, and may hold modules to import
    more: what differs; the last of an argument counts"""
    weights = [] if draft is None else ["--speculative-draft-model-path", str(folder / draft)]
    arguments: Sequence[str] = [
        *("--model-path", str(folder / "target"), *weights, "--speculative-algorithm", algorithm),
        *("--speculative-num-steps", str(tiny_drafts.GAMMA), "--speculative-num-draft-tokens", "16"),
        *("--dspark-policy", str(folder / "policy.yaml")),
        *("--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup"),
        *("--max-total-tokens", "8192", "--max-running-requests", "16", *more),
    ]
    paths = os.pathsep.join(path for path in (str(folder), os.environ.get("PYTHONPATH")) if path)
    return Server(arguments, {"PYTHONPATH": paths, **(environment or {})})
