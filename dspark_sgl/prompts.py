"""Prompts from a file: JSON lines with `prompt`, one user turn, and optionally `domain`. Never applies a template."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .policies.errors import PolicyError


@dataclass(frozen=True)
class Prompt:
    """text: what a user says; domain: its kind, for figures by kind"""

    domain: str
    text: str


def read_prompts(file: Path, limit: int | None = None) -> list[Prompt]:
    """All prompts, or the first `limit`, domains in turn. A line without a domain belongs to one named as the file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PolicyError(str(file), 0, 0, f"prompts cannot be read: {reason}") from None
    prompts = [_prompt(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PolicyError(str(file), 0, 0, 'holds no prompt; expected lines like {"prompt": "...", "domain": "math"}')
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    turns = [prompt for turn in zip_longest(*domains.values()) for prompt in turn if prompt is not None]
    return turns[:limit]


def _prompt(file: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError:
        raise PolicyError(str(file), number, 1, "is not JSON") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise PolicyError(str(file), number, 1, 'has no text under "prompt"')
    domain = row.get("domain", file.stem)
    if not isinstance(domain, str):
        raise PolicyError(str(file), number, 1, f'"domain" must be text, not {json.dumps(domain)}')
    return Prompt(domain, text)
