"""`bench accept`, `calibrate` and the record they stand on, with a real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from dspark_sgl.cli import main
from dspark_sgl.load_client import Load, serve, write_dataset
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.prompts import read_prompts
from dspark_sgl.recorder import RecordedRound, read_record
from dspark_sgl.server import Server
from dspark_sgl.settings import RECORD_VARIABLE

from .conftest import PROMPTS, SHARED

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]


def rounds_of(record: Path, rid: str) -> list[RecordedRound]:
    return [found for found in read_record(record) if found.rid == rid]


def test_the_record_holds_the_rounds_that_sglang_counts(spec_server: Server, record: Path, prompts: list[str]):
    """Eight requests at a time, greedy and sampled, some of a lower depth, each found under its own name."""

    def ask(index: int) -> dict[str, Any]:
        limit = {} if index % 3 else {"custom_params": {"dspark": {"max_depth": 2}}}
        sampling = {"temperature": index % 2, "max_new_tokens": 40, **limit}
        body = {"text": prompts[index], "rid": f"recorded-{index}", "sampling_params": sampling}
        return dict(spec_server.post("/generate", body)["meta_info"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for index, meta in enumerate(answers):
        rounds = rounds_of(record, f"recorded-{index}")
        assert len(rounds) == meta["spec_verify_ct"]
        counted = Counter(r.accepted for r in rounds)
        assert [counted[n] for n in range(max(counted) + 1)] == meta["spec_correct_drafts_histogram"]
        assert {r.offered for r in rounds} == {6 if index % 3 else 2}
        assert {r.temperature for r in rounds} == {index % 2}
        assert all(0 < c < 1 for r in rounds for c in r.confidence or [None])


def test_a_request_of_depth_0_has_no_rounds(spec_server: Server, record: Path, prompts: list[str]):
    plainly = {"max_new_tokens": 8, "custom_params": {"dspark": {"max_depth": 0}}}
    spec_server.post("/generate", {"text": prompts[0], "rid": "plain", "sampling_params": plainly})
    assert rounds_of(record, "plain") == []


def test_sglangs_client_drives_a_load(
    spec_server: Server, plain_server: Server, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What `bench load` says of a point is what the server counted while the client drove it."""
    dataset = tmp_path / "prompts.jsonl"
    write_dataset(read_prompts(PROMPTS, 12), 24, dataset)
    before = spec_server.report()["counts"]
    fast = serve(spec_server, str(target), dataset, Load(concurrency=4), 8, seed=0)
    after = spec_server.report()["counts"]
    assert fast.accepted_length is not None and 1.1 < fast.accepted_length < 7
    assert sum(fast.accepted.values()) == after["request_rounds"] - before.get("request_rounds", 0)
    assert fast.plain == 0 and fast.depth == 6
    verified, accepted = (after[name] - before.get(name, 0) for name in ("drafted", "emitted"))
    accepted -= sum(fast.accepted.values())  # what each round emits beside its drafts
    assert (sum(fast.reliability["count"]), sum(fast.reliability["happened"])) == (verified, accepted)
    slow = serve(plain_server, str(target), dataset, Load(rate=2.0), 6, seed=0)
    assert (slow.accepted_length, slow.plain, slow.depth, slow.accepted, slow.reliability) == (None, 1.0, 0.0, {}, {})
    for served in (fast, slow):
        assert served.output_tps > 1 and served.tps_per_user > 1
        assert 0 < served.ttft_ms[0] <= served.ttft_ms[1] <= served.ttft_ms[2]
    assert capsys.readouterr().out == "", "the client's own report is not shown"


def test_both_commands_end_to_end(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One server: its rounds are counted by `bench accept`, recorded, and fitted by `calibrate`."""
    record, out, sts = tmp_path / "rounds.jsonl", tmp_path / "accept.json", tmp_path / "sts.json"
    monkeypatch.setenv(RECORD_VARIABLE, str(record))
    run = ["--model", str(target), "--prompts", str(PROMPTS), "--limit", "3", "--max-new-tokens", "96"]
    assert (
        main(["bench", "accept", *run, "--temperature", "0", "--temperature", "1", "--json", str(out), "--", *SHARED])
        == 0
    )
    table = capsys.readouterr().out
    reports = json.loads(out.read_text())["temperatures"]
    assert list(reports) == ["0", "1"]
    for temperature, report in reports.items():
        assert list(report["domains"]) == ["code", "math", "chat"]
        entries = report["domains"].values()
        for name in ("rounds", "tokens"):
            assert report["overall"][name] == sum(entry[name] for entry in entries)
        assert report["macro"] == pytest.approx(sum(entry["accepted_length"] for entry in entries) / 3)
        assert 1 < report["overall"]["accepted_length"] < 7
        assert len(report["overall"]["acceptance_by_position"]) == 6
        assert report["run"]["draft"].endswith("smollm2-135m-instruct")
        assert report["run"]["policy"] == "full-block"
        assert f"{report['overall']['accepted_length']:.3f}" in table
        mine = [r for r in read_record(record) if r.temperature == float(temperature)]
        assert len(mine) == report["overall"]["rounds"] and {r.offered for r in mine} == {6}
        assert len({r.rid for r in mine}) == 3
    assert main(["calibrate", "--record", str(record), "--model", str(target), "--out", str(sts)]) == 0
    assert (Calibration.from_json(sts).temperatures > 0).all()


def test_a_load_bench_end_to_end(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two servers, one of which serves two arms by turns."""
    out, page = tmp_path / "load.json", tmp_path / "load.html"
    run = ["--model", str(target), "--prompts", str(PROMPTS), "--limit", "6", "--max-new-tokens", "16"]
    run += ["--arms", "plain,off,fixed-3", "--concurrency", "1,2", "--passes", "1", "--per-user", "2"]
    assert main(["bench", "load", *run, "--json", str(out), "--html", str(page), "--", *SHARED]) == 0
    report = json.loads(out.read_text())
    points = {(point["arm"], point["concurrency"]): point for point in report["points"]}
    assert set(points) == {(arm, users) for arm in ("plain", "off", "fixed-3") for users in (1, 2)}
    for (arm, _), point in points.items():
        assert point["output_tps"] > 1
        assert (point["depth"], point["plain_share"]) == ((3, 0) if arm == "fixed-3" else (0, 1))
    said = capsys.readouterr().out
    assert all(arm in said and arm in page.read_text() for arm in ("plain", "off", "fixed-3"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_told_to_end_ends_its_server(target: Path, sent: signal.Signals, code: int):
    command = [
        sys.executable,
        "-m",
        "dspark_sgl.cli",
        "bench",
        "accept",
        "--model",
        str(target),
        "--prompts",
        str(PROMPTS),
    ]
    # Who starts the tests in the background has SIGINT ignored, and every process under them would inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=heed) as running:
        try:
            assert running.stderr is not None and b"Starting" in running.stderr.readline()
            end = time.monotonic() + 60
            while not (started := psutil.Process(running.pid).children(recursive=True)):
                assert time.monotonic() < end
                time.sleep(0.001)  # soon: the server must be known to the command from its first moment
            running.send_signal(sent)
            try:
                assert running.wait(30) == code
            except subprocess.TimeoutExpired:
                running.send_signal(sent)  # Python loses one that arrives while it runs a callback: a user asks again
                assert running.wait(30) == code
            assert psutil.wait_procs(started, timeout=10)[1] == []
        finally:
            running.terminate()
