"""Where this package keeps what it makes on a machine: `$XDG_CACHE_HOME/dspark_sgl`, else `~/.cache/dspark_sgl`."""

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder of our cache; it may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "dspark_sgl", *parts)
