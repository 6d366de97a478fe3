"""Verify rounds on file, one JSON line per round and request, for `dspark-sgl bench accept` and `calibrate`.

    {"rid": "a1", "temperature": 1.0, "offered": 3, "accepted": 1, "confidence": [0.91, 0.6, 0.44]}

`confidence` is as the drafter gave it, before calibration: of each offered draft, given that those before it survive;
null from a drafter without. Only appends, and never takes a server down: what cannot be written is one line in the log.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .policies.errors import PolicyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .request_view import RequestLoad

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRound:
    """One request in one verify round. confidence: `[offered]`, None where the drafter gave no number"""

    rid: str
    temperature: float
    offered: int
    accepted: int
    confidence: list[float | None] | None


class Recorder:
    """Appends the rounds of one scheduler, whole lines as they happen: a client that has its answer finds them all."""

    def __init__(self, file: TextIO) -> None:
        self._file: TextIO | None = file

    @classmethod
    def opened(cls, file: Path | None) -> Recorder | None:
        """None where nothing is to be recorded, or can be."""
        if file is None:
            return None
        try:
            return cls(file.open("a"))
        except OSError as error:
            logger.error("dspark: DSPARK_RECORD: %s cannot be written: %s; nothing is recorded", file, error.strerror)
            return None

    def write(
        self,
        requests: Sequence[RequestLoad],
        confidence: NDArray[np.float64] | None,
        offered: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """One round. confidence: `[n, D]`; offered: drafts verified; lengths: tokens emitted, bonus included"""
        if self._file is None:
            return
        said = [None] * len(requests) if confidence is None else confidence.tolist()
        lines = [
            json.dumps(asdict(RecordedRound(r.rid, r.signals.temperature, k, n - 1, _numbers(row, k))))
            for r, row, k, n in zip(requests, said, offered, lengths, strict=True)
            if k
        ]
        try:
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
        except OSError as error:
            logger.error("dspark: DSPARK_RECORD: %s; nothing more is recorded", error)
            self._file = None


def _numbers(row: list[float] | None, count: int) -> list[float | None] | None:
    # JSON knows no NaN; seven digits are what a float32 has.
    return None if row is None else [float(f"{c:.7g}") if math.isfinite(c) else None for c in row[:count]]


def read_record(file: Path) -> Iterator[RecordedRound]:
    """What a recorder wrote, in order. A last line without an end is one that a server was stopped in: left out."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(str(file), 0, 0, f"cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            yield _parsed(json.loads(line))
        except (ValueError, TypeError, KeyError):
            remedy = "no recorded round; files of a server run with DSPARK_RECORD=FILE are expected"
            raise PolicyError(str(file), number, 1, remedy) from None


def _parsed(line: dict[str, Any]) -> RecordedRound:
    said = line["confidence"]
    confidence = None if said is None else [None if c is None else float(c) for c in said]
    found = RecordedRound(
        str(line["rid"]), float(line["temperature"]), int(line["offered"]), int(line["accepted"]), confidence
    )
    if not 0 <= found.accepted <= found.offered or (confidence is not None and len(confidence) != found.offered):
        raise ValueError
    return found
