"""`dspark-sgl profile`: profiles are found, printed and drawn; what cannot be is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dspark_sgl.cli import main
from dspark_sgl.policies.cost import CostModel
from dspark_sgl.policies.reference import reference_cost

Captured = pytest.CaptureFixture[str]

ABOUT: dict[str, object] = {"model": "/models/small-8b", "algorithm": "DSPARK_SGL", "dtype": "torch.bfloat16", "tp": 2}


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dspark_sgl" / "costs"


def save(file: Path, model: str, age: int) -> CostModel:
    cost = reference_cost()
    cost.save(file, {**ABOUT, "model": model})
    os.utime(file, (1_000_000 - age, 1_000_000 - age))
    return cost


def test_the_newest_profile_is_the_default(costs: Path, capsys: Captured):
    save(costs / "aa11.json", "/models/old", age=10)
    cost = save(costs / "aa22.json", "/models/new", age=0)
    assert main(["profile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert Path(report["file"]) == costs / "aa22.json"
    assert report["about"]["model"] == "/models/new"
    assert len(report["points"]) == len(cost.points)
    assert main(["profile", "aa1"]) == 0
    assert "/models/old" in capsys.readouterr().out


def test_every_measured_step_is_in_the_table(costs: Path, capsys: Captured):
    cost = save(costs / "aa11.json", "/models/x", age=0)
    assert main(["profile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind in ("plain", "draft", "verify"):
        assert sum(line.startswith(f"{kind}: ") for line in lines) == 1
    cells = [cell for line in lines for cell in line.split()]
    for point in cost.points:
        assert f"{1e3 * point.seconds:.1f}" in cells
    assert any(line.split()[:3] == ["512", "x", "8"] for line in lines)


def test_the_list_says_what_was_measured_and_which_file_is_damaged(costs: Path, capsys: Captured):
    assert main(["profile", "--list"]) == 0
    assert "holds no profile" in capsys.readouterr().out
    save(costs / "aa11.json", "/models/old", age=10)
    save(costs / "bb22.json", "/models/new", age=0)
    (costs / "cc33.json").write_text("{")
    os.utime(costs / "cc33.json", (0, 0))
    assert main(["profile", "--list"]) == 0
    new, old, damaged = capsys.readouterr().out.splitlines()
    assert new == "bb22  new, DSPARK_SGL, bfloat16, tp 2, ?"
    assert old.startswith("aa11  old")
    assert damaged.startswith("cc33  holds no profile")
    assert main(["profile", "--list", "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)] == ["bb22", "aa11", "cc33"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: is neither a file nor a cached profile"),
        (["aa"], "aa: is the start of 2 profiles"),
        (["{damaged}"], "holds no profile that this version reads"),
        (["--plot", "{nowhere}/p.png"], "cannot be written"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments: list[str], words: str, costs: Path, tmp_path: Path, capsys: Captured):
    save(costs / "aa11.json", "/models/old", age=10)
    save(costs / "aa22.json", "/models/new", age=0)
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"version": 2, "points": []}')
    assert main(["profile", *(a.format(damaged=damaged, nowhere=tmp_path / "no") for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_profile_that_is_about_something_odd_is_named(costs: Path, capsys: Captured):
    save(costs / "aa11.json", "/models/old", age=10)
    profile = json.loads((costs / "aa11.json").read_text())
    for odd in (["a"], "text", 3):
        (costs / "aa11.json").write_text(json.dumps({**profile, "about": odd}))
        assert main(["profile", "--list"]) == 0
        assert (
            capsys.readouterr().out == "aa11  holds no profile that this version reads; delete it and start a server\n"
        )


def test_an_empty_cache_says_where_profiles_come_from(costs: Path, capsys: Captured):
    assert main(["profile"]) == 1
    assert capsys.readouterr().err == f"error: {costs}: holds no profile; a server makes one when it starts\n"


def test_a_picture_is_drawn(costs: Path, tmp_path: Path, capsys: Captured):
    save(costs / "aa11.json", "/models/x", age=0)
    assert main(["profile", "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
