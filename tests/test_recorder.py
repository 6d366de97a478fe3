"""The record of verify rounds: what is written is read again, and neither a full disk nor a damaged file does harm."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.signals import RequestSignals
from dspark_sgl.recorder import RecordedRound, Recorder, read_record
from dspark_sgl.request_view import RequestLoad


def request(rid: str, temperature: float = 1.0) -> RequestLoad:
    return RequestLoad(RequestSignals("default", 10, 3, 1.5, temperature), None, rid)


def write(
    recorder: Recorder,
    requests: list[RequestLoad],
    confidence: np.ndarray | None,
    offered: list[int],
    accepted: list[int],
) -> None:
    """A round of chains."""
    chains = Forest.chains(len(offered), max(offered))
    verified, survived = (chains.depth <= np.array(counts)[:, None] for counts in (offered, accepted))
    recorder.write(requests, chains, verified, survived, confidence)


def test_what_is_written_is_read_again(tmp_path: Path):
    file = tmp_path / "rounds.jsonl"
    recorder = Recorder.opened(file)
    assert recorder is not None
    confidence = np.array([[0.9, 0.25, 0.5], [0.125, np.nan, 0.3], [0.7, 0.7, 0.7]])
    write(recorder, [request("a"), request("b", 0.0), request("c")], confidence, [3, 2, 0], [1, 2, 0])
    write(recorder, [request("a")], None, [4], [0])
    assert "ranks" not in file.read_text(), "of trees only"
    tree = Forest.trees(np.array([[0, 0, 1, 1, 4, 4]]))
    survived = np.array([[True, False, False, True, False, False]])
    everything = np.ones((1, 6), dtype=bool)
    recorder.write([request("a")], tree, everything, survived, np.full((1, 6), 0.5))
    recorder.write([request("a")], tree, everything & (tree.depth < 3), survived, np.full((1, 6), 0.5))
    assert list(read_record(file)) == [
        RecordedRound("a", 1.0, 3, 1, [0.9, 0.25, 0.5]),
        RecordedRound("b", 0.0, 2, 2, [0.125, None]),  # and c, which was offered nothing, was in no verify round
        RecordedRound("a", 1.0, 4, 0, None),
        RecordedRound("a", 1.0, 3, 2, None, nodes=6, ranks=[0, 1]),
        RecordedRound("a", 1.0, 2, 2, None, nodes=4, ranks=[0, 1]),  # nothing hung from the last one accepted
    ]


def test_a_round_that_the_server_was_stopped_in_is_left_out(tmp_path: Path):
    file = tmp_path / "rounds.jsonl"
    line = json.dumps({"rid": "a", "temperature": 1, "offered": 1, "accepted": 1, "confidence": [0.5]})
    file.write_text(f"{line}\n{line[:20]}")
    assert len(list(read_record(file))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        '{"rid": "a"}',
        '{"rid": "a", "temperature": 1, "offered": 1, "accepted": 2, "confidence": null}',
        '{"rid": "a", "temperature": 1, "offered": 2, "accepted": 1, "confidence": [0.5]}',
        '{"rid": "a", "temperature": 1, "offered": 2, "accepted": 1, "confidence": null, "nodes": 3, "ranks": [0, 1]}',
    ],
)
def test_a_foreign_line_is_named(tmp_path: Path, line: str):
    file = tmp_path / "rounds.jsonl"
    file.write_text(f'{{"rid": "a", "temperature": 1, "offered": 1, "accepted": 1, "confidence": null}}\n{line}\n')
    with pytest.raises(PolicyError, match=r"rounds\.jsonl:2:1: no recorded round"):
        list(read_record(file))


def test_a_place_that_cannot_be_written_is_one_line_and_no_recorder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert Recorder.opened(None) is None
    assert Recorder.opened(tmp_path / "no" / "rounds.jsonl") is None
    assert len(caplog.records) == 1 and "DSPARK_RECORD" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_the_record_and_not_the_server(caplog: pytest.LogCaptureFixture):
    recorder = Recorder.opened(Path("/dev/full"))
    assert recorder is not None
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            write(recorder, [request("a")], None, [1], [0])
    assert caplog.text.count("nothing more is recorded") == 1
