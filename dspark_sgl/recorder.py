"""Verify rounds on file, one JSON line per round and request, for `dspark-sgl bench accept` and `calibrate`.

    {"rid": "a1", "temperature": 1.0, "offered": 3, "accepted": 1, "confidence": [0.91, 0.6, 0.44]}
    {"rid": "a1", "temperature": 0.0, "offered": 3, "accepted": 2, "confidence": null, "nodes": 16, "ranks": [0, 2]}

`confidence` is as the drafter gave it, before calibration: of each offered draft, given that those before it survive;
null from a drafter without. The second line is of a tree: `nodes` drafts were verified; `offered` is how deep the
target was put to the test, one deeper than it accepted unless nothing hung there; `ranks` is each accepted draft's
place among its siblings, 0 for the likeliest. Only appends, and never takes a server down: what
cannot be written is one line in the log.
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
    from .policies.batch import Bools, Floats
    from .policies.forest import Forest
    from .request_view import RequestLoad

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRound:
    """One request in one verify round. confidence: `[offered]`, None where the drafter gave no number

    Of a tree only: nodes, drafts verified; ranks `[accepted]`
    """

    rid: str
    temperature: float
    offered: int
    accepted: int
    confidence: list[float | None] | None
    nodes: int | None = None
    ranks: list[int] | None = None

    @property
    def line(self) -> str:
        return json.dumps(
            {key: value for key, value in asdict(self).items() if key not in _OF_TREES or value is not None}
        )


_OF_TREES = ("nodes", "ranks")


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
        forest: Forest,
        verified: Bools,
        survived: Bools,
        confidence: Floats | None,
    ) -> None:
        """One round. verified, survived: `[n, N]`, of the drafts in `forest`; confidence: `[n, N]`"""
        if self._file is None:
            return
        said = None if confidence is None or not forest.is_chain else confidence.tolist()
        ranks = None if forest.is_chain else forest.ranks(survived)
        # How deep a tree put the target to the test; a chain is offered whole, however early it fails.
        reached = verified if forest.is_chain else forest.tested(verified, survived)
        offered = (reached * forest.depth).max(axis=1, initial=0).tolist()
        nodes, accepted = verified.sum(1).tolist(), survived.sum(1).tolist()
        lines = [
            RecordedRound(
                rid=request.rid,
                temperature=request.signals.temperature,
                offered=offered[i],
                accepted=accepted[i],
                confidence=None if said is None else _numbers(said[i], offered[i]),
                nodes=None if ranks is None else nodes[i],
                ranks=None if ranks is None else ranks[i],
            ).line
            for i, request in enumerate(requests)
            if nodes[i]
        ]
        try:
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
        except OSError as error:
            logger.error("dspark: DSPARK_RECORD: %s; nothing more is recorded", error)
            self._file = None


def _numbers(row: list[float], count: int) -> list[float | None]:
    # JSON knows no NaN; seven digits are what a float32 has.
    return [float(f"{c:.7g}") if math.isfinite(c) else None for c in row[:count]]


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
    nodes, ranks = (line.get(key) for key in _OF_TREES)
    found = RecordedRound(
        rid=str(line["rid"]),
        temperature=float(line["temperature"]),
        offered=int(line["offered"]),
        accepted=int(line["accepted"]),
        confidence=confidence,
        nodes=None if nodes is None else int(nodes),
        ranks=None if ranks is None else [int(rank) for rank in ranks],
    )
    if not 0 <= found.accepted <= found.offered:
        raise ValueError
    for said, count in ((confidence, found.offered), (ranks, found.accepted)):
        if said is not None and len(said) != count:
            raise ValueError
    return found
