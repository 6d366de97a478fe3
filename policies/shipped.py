"""Finding a policy: a file of the user's, or one that ships with the package."""

import os
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from .errors import PolicyError
from .language import Policy
from .reader import parse_policy, read_policy_file
from .suggest import did_you_mean

_FOLDER = "dspark_sgl.policies_yaml"


def shipped_names() -> list[str]:
    """Names of the shipped policies, numbers in numeric order."""
    return sorted((entry.name.removesuffix(".yaml") for entry in _entries()), key=_natural)


def find_policy(name_or_path: str) -> Policy:
    """The policy in that file, or else the shipped one of that name."""
    file, content = policy_source(name_or_path)
    return parse_policy(content, file)


def policy_source(name_or_path: str) -> tuple[str, bytes]:
    """What `find_policy` reads: the file's name, for messages, and its content."""
    if _is_file(name_or_path):
        return name_or_path, read_policy_file(name_or_path)
    for entry in _entries():
        if entry.name == f"{name_or_path}.yaml":
            return entry.name, entry.read_bytes()
    if os.path.isdir(name_or_path):
        return name_or_path, read_policy_file(name_or_path)
    names = shipped_names()
    if os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        reason = "no such policy file"
    else:
        reason = f"no policy file and no shipped policy of this name (shipped: {', '.join(names)})"
    raise PolicyError(name_or_path or "''", 0, 0, reason + did_you_mean(Path(name_or_path).stem, names))


def policy_file(name_or_path: str) -> Path | None:
    """The file that a user would edit; None where the package is not unpacked on disk."""
    if _is_file(name_or_path):
        return Path(name_or_path)
    return next((e for e in _entries() if isinstance(e, Path) and e.name == f"{name_or_path}.yaml"), None)


def _entries() -> list[Traversable]:
    return [entry for entry in resources.files(_FOLDER).iterdir() if entry.name.endswith(".yaml")]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # for instance a name longer than the file system allows
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
