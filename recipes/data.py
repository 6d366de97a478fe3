"""Read prompts and self-generated responses. Knows the file format and nothing about models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One response of the target: token ids of the templated prompt, of the response, and its temperature."""

    prompt_ids: list[int]
    response_ids: list[int]
    temperature: float

    def __len__(self) -> int:
        """Tokens of the whole."""
        return len(self.prompt_ids) + len(self.response_ids)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _lines(path: str | Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as lines:
        for line in lines:
            # A file that is still being written may end in half a line.
            if line.endswith("\n"):
                yield json.loads(line)


def read_records(path: str | Path) -> list[Record]:
    """All complete lines of a response file (`.jsonl` or `.jsonl.gz`)."""
    return [Record(r["prompt_ids"], r["response_ids"], float(r["temperature"])) for r in _lines(path)]


def read_prompts(path: str | Path) -> list[str]:
    """The `prompt` field of every line of a prompt file."""
    return [row["prompt"] for row in _lines(path)]


def read_domains(path: str | Path) -> list[tuple[str, str]]:
    """(domain, prompt) of every line of an evaluation prompt file."""
    return [(row["domain"], row["prompt"]) for row in _lines(path)]
