"""`dspark-sgl calibrate` on recorded rounds: what it writes a server reads, from where it writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dspark_sgl import sts_file
from dspark_sgl.cli import main
from dspark_sgl.policies.calibration import Calibration, sigmoid
from dspark_sgl.policies.forest import Forest
from dspark_sgl.recorder import RecordedRound, Recorder
from dspark_sgl.sts_file import find_sts, place_for_sts

from .draft_checkpoints import write_draft
from .test_recorder import request

Captured = pytest.CaptureFixture[str]


def record(file: Path, sharpness: float = 2.0, count: int = 6000, temperature: float = 1.0) -> Path:
    """Forty requests of a drafter whose logits are `sharpness` times the true ones."""
    dice = np.random.default_rng(0)
    logits = dice.normal(0.5, 1.2, (count, 3))
    survived = (dice.random(logits.shape) < sigmoid(logits)).cumprod(1).astype(bool)
    recorder = Recorder.opened(file)
    assert recorder is not None
    requests = [request(f"r{i % 40:02}", temperature) for i in range(count)]
    offered = np.ones_like(survived)
    recorder.write(requests, Forest.chains(count, 3), offered, survived, sigmoid(sharpness * logits))
    return file


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_draft(tmp_path / "draft")


def calibrate(file: Path, draft: Path, *more: str) -> int:
    return main(["calibrate", "--record", str(file), "--model", "m", "--draft", str(draft), *more])


def test_known_temperatures_are_written_and_a_server_reads_them(draft: Path, tmp_path: Path, capsys: Captured):
    figures, picture = tmp_path / "figures.json", tmp_path / "p.png"
    file = record(tmp_path / "rounds.jsonl", count=20_000)
    assert calibrate(file, draft, "--json", str(figures), "--plot", str(picture)) == 0
    found = find_sts(draft)
    assert found == draft / "sts.json"
    assert Calibration.from_json(found).temperatures[:3] == pytest.approx([2.0] * 3, rel=0.25)
    report = json.loads(figures.read_text())
    held_out = report["held_out"]
    assert (report["fitted_on"]["requests"], held_out["requests"], held_out["rounds"]) == (20, 20, 10_000)
    assert held_out["mean_ece_before"] > 0.05
    assert held_out["mean_ece_after"] < 2 * held_out["mean_ece_floor"]
    # One temperature per position keeps the order of position 1; deeper, it can only change between positions.
    assert held_out["after"][0]["auc"] == held_out["before"][0]["auc"] > 0.7
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "10000 rounds of 20 others" in table and str(found) in table


def test_figures_on_stdout_stand_alone(draft: Path, tmp_path: Path, capsys: Captured):
    assert calibrate(record(tmp_path / "rounds.jsonl"), draft, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["temperatures"] == json.loads((draft / "sts.json").read_text())["temperatures"]


def test_the_file_names_no_folder_of_the_machine_it_was_fitted_on(draft: Path, tmp_path: Path):
    out = tmp_path / "mine.json"
    assert calibrate(record(tmp_path / "rounds.jsonl"), draft, "--out", str(out)) == 0
    assert str(tmp_path) not in out.read_text()
    assert find_sts(draft) is None


def test_a_draft_that_is_not_ours_to_change_gets_its_temperatures_from_the_cache(
    draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sts_file, "__file__", str(tmp_path / "package.py"))  # as if the draft were the package's own
    (draft / "sts.json").write_text('{"version": 1, "temperatures": [1.5]}')
    assert find_sts(draft) == draft / "sts.json"
    assert calibrate(record(tmp_path / "rounds.jsonl"), draft) == 0
    found = find_sts(draft)
    assert found == place_for_sts(draft) and found.is_relative_to(tmp_path / "cache")
    assert Calibration.from_json(found).temperatures[0] == pytest.approx(2.0, rel=0.3)
    # Links lead to the same draft; one trained anew is another.
    linked = tmp_path / "cache" / "dspark_sgl" / "flat" / "x"
    linked.mkdir(parents=True)
    for file in draft.glob("*.safetensors"):
        (linked / file.name).symlink_to(file)
    assert find_sts(linked) == found
    weights = next(draft.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    assert find_sts(draft) == draft / "sts.json"


def test_rounds_of_another_temperature_are_left_out(draft: Path, tmp_path: Path):
    file = record(record(tmp_path / "rounds.jsonl", 2.0), 0.5, temperature=0.0)
    out = tmp_path / "out.json"
    for chosen, wanted in ((0, 0.5), (1, 2.0)):
        assert calibrate(file, draft, "--temperature", str(chosen), "--out", str(out)) == 0
        assert Calibration.from_json(out).temperatures[0] == pytest.approx(wanted, rel=0.3)


def write(file: Path, rounds: list[RecordedRound]) -> None:
    file.write_text("".join(json.dumps(vars(r)) + "\n" for r in rounds))


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([RecordedRound("a", 1, 2, 0, None)] * 900, "its drafter gives no confidence"),
        ([RecordedRound("a", 1, 1, 0, [0.5])] * 900, "900 rounds of 1 requests are too few"),
        ([], "0 rounds of 0 requests are too few"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(
    rounds: list[RecordedRound], words: str, draft: Path, tmp_path: Path, capsys: Captured
):
    write(tmp_path / "rounds.jsonl", rounds)
    assert calibrate(tmp_path / "rounds.jsonl", draft) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert find_sts(draft) is None


def test_temperatures_that_a_record_lacks_are_answered_with_those_it_has(draft: Path, tmp_path: Path, capsys: Captured):
    write(tmp_path / "r.jsonl", [RecordedRound("a", t, 1, 0, [0.5]) for t in (1.0, 0.0)])
    assert calibrate(tmp_path / "r.jsonl", draft, "--temperature", "0.5") == 1
    assert "has no round at 0.5; its temperatures are 0, 1\n" in capsys.readouterr().err


def test_only_what_a_server_finds_is_said_to_be_taken(draft: Path, tmp_path: Path, capsys: Captured):
    file = record(tmp_path / "rounds.jsonl")
    assert calibrate(file, draft, "--out", str(tmp_path / "mine.json")) == 0
    assert "a server reads only sts.json beside its draft" in capsys.readouterr().out
    for arguments in ([], ["--out", str(draft / "sts.json")]):
        assert calibrate(file, draft, *arguments) == 0
        assert "servers of this draft take it from their next start on" in capsys.readouterr().out


def test_a_confidence_that_is_no_number_counts_as_none(draft: Path, tmp_path: Path):
    said = [math.nan, 0.4]
    write(tmp_path / "r.jsonl", [RecordedRound(f"r{i % 9}", 1, 2, i % 3, said) for i in range(900)])
    out = tmp_path / "out.json"
    assert calibrate(tmp_path / "r.jsonl", draft, "--out", str(out)) == 0
    assert "NaN" not in out.read_text()


def test_what_cannot_be_written_is_known_before_anything_is_run(draft: Path, tmp_path: Path, capsys: Captured):
    for option in ("--out", "--plot", "--json"):
        assert calibrate(tmp_path / "none.jsonl", draft, option, str(tmp_path / "no" / "x.png")) == 1
        assert f"{option}: {tmp_path}/no/x.png cannot be written" in capsys.readouterr().err
    assert main(["calibrate", "--record", str(record(tmp_path / "r")), "--model", "m", "--draft", "nowhere"]) == 1
    assert "--draft: nowhere: no such folder" in capsys.readouterr().err


def test_a_position_that_is_never_accepted_shows_no_auc(draft: Path, tmp_path: Path, capsys: Captured):
    write(tmp_path / "r.jsonl", [RecordedRound(f"r{i % 9}", 1, 2, i % 2, [0.5, 0.4]) for i in range(900)])
    figures = tmp_path / "figures.json"
    assert calibrate(tmp_path / "r.jsonl", draft, "--json", str(figures)) == 0
    rows = json.loads(figures.read_text())["held_out"]["after"]
    assert rows[1]["auc"] is None and not math.isnan(rows[0]["auc"])
    assert "nan" not in capsys.readouterr().out
