"""Where a draft's temperatures lie: `sts.json` beside it, or, fitted on this machine for a draft whose folder is not
the user's to write in, in the cache under a fingerprint of its weights. Never reads what is in them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .cache import cache_dir

NAME = "sts.json"


def find_sts(draft: Path) -> Path | None:
    """What a server takes for this draft: temperatures fitted on this machine go before those that came with it."""
    return next((file for file in (_cached(draft), draft / NAME) if file.is_file()), None)


def place_for_sts(draft: Path) -> Path:
    """Where `dspark-sgl calibrate` puts what it has fitted, and `find_sts` finds it."""
    # An update of the package replaces its folder; a folder of links is made anew (see draft_spelling.py).
    not_ours = (Path(__file__).parent, cache_dir("flat"))
    if any(draft.resolve().is_relative_to(root.resolve()) for root in not_ours) or not os.access(draft, os.W_OK):
        return _cached(draft)
    return draft / NAME


def _cached(draft: Path) -> Path:
    """A draft trained anew has other times and gets temperatures of its own; links lead to the same weights."""
    stats = [(file.name, file.stat()) for file in sorted(draft.glob("*.safetensors")) if file.is_file()]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return cache_dir("sts", f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json")
