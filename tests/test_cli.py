"""The command line: what is right, what is wrong in one line, exit codes, and the same as JSON."""

import json
import subprocess
from pathlib import Path

import pytest
from draft_checkpoints import CONFIG, TARGET, write_draft

from dspark_sgl import compat, doctor
from dspark_sgl.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DSPARK_POLICY", "SGLANG_PLUGINS", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target(tmp_path: Path) -> str:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET))
    return str(folder)


def findings(capsys: Captured, *arguments: str) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in report["findings"]}


def test_the_doctor_finds_this_environment_fit(capsys: Captured):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        *("SGLang", "surface", "torch", "device", "NVML", "FlashInfer", "Triton"),
        *("plugin", "platform", "drafters", "policy", "draft"),
    ]
    assert all(line.split()[0] in ("ok", "missing") for line in lines)


def test_a_missing_sglang_is_fatal_and_has_a_remedy(capsys: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed", lambda: None)
    code, found = findings(capsys)
    assert (code, found["SGLang"]["state"]) == (1, "missing")
    assert found["SGLang"]["remedy"] == "pip install sglang==0.5.23"


def test_a_changed_sglang_is_fatal_and_named(capsys: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "check", lambda: ["sglang.srt.gone is gone (for tests)", "another"])
    code, found = findings(capsys)
    assert (code, found["surface"]["detail"]) == (1, "sglang.srt.gone is gone (for tests) (and 1 more)")


def test_an_untested_version_that_fits_is_said_and_allowed(capsys: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed", lambda: "0.5.99")
    code, found = findings(capsys)
    assert (code, found["SGLang"]["detail"]) == (0, "0.5.99, not the tested 0.5.23")


@pytest.mark.parametrize(("value", "code"), [("other", 1), ("other, dspark_sgl,dspark_cpu", 0)])
def test_a_plugin_list_that_leaves_us_out_is_fatal(capsys, monkeypatch: pytest.MonkeyPatch, value: str, code: int):
    monkeypatch.setenv("SGLANG_PLUGINS", value)
    assert findings(capsys)[0] == code


def test_without_entry_points_sglang_would_not_find_us(capsys: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    code, found = findings(capsys)
    assert (code, found["plugin"]["state"], found["platform"]["state"]) == (1, "missing", "missing")


def test_policy_and_draft_are_judged(capsys: Captured, target: str, tmp_path: Path):
    draft = str(write_draft(tmp_path / "draft"))
    code, found = findings(capsys, "--model-path", target, "--draft", draft, "--policy", "fixed-3")
    assert (code, found["draft"]["state"], found["policy"]["state"]) == (0, "ok", "ok")
    wrong = str(write_draft(tmp_path / "wrong", CONFIG | {"hidden_size": 16}))
    code, found = findings(capsys, "--model-path", target, "--draft", wrong, "--policy", "fixd-3")
    assert (code, found["draft"]["state"], found["policy"]["state"]) == (1, "broken", "broken")
    assert "hidden_size is 16" in found["draft"]["detail"]
    assert "did you mean 'fixed-3'?" in found["policy"]["detail"]


def test_a_target_without_a_draft_is_fatal_until_one_is_cached(capsys: Captured, target: str, tmp_path: Path):
    assert findings(capsys, "--model-path", target)[1]["draft"]["state"] == "missing"
    write_draft(tmp_path / "cache" / "dspark_sgl" / "drafts" / "mine")
    code, found = findings(capsys, "--model-path", target)
    assert (code, found["draft"]["state"]) == (0, "ok")


def test_what_is_asked_for_is_judged_by_what_it_needs(capsys: Captured, target: str):
    code, found = findings(capsys, "--model-path", target, "--algorithm", "ngram_sgl")
    assert (code, found["draft"]["state"], found["draft"]["detail"]) == (0, "ok", "ngram_sgl needs none")
    code, found = findings(capsys, "--model-path", target, "--algorithm", "FOO")
    assert (code, found["draft"]["state"]) == (1, "broken")
    assert "'FOO' is unknown; there are DFLASH_SGL, DSPARK_SGL" in found["draft"]["detail"]


@pytest.mark.parametrize(
    ("model", "code", "state"),
    [("/no/such", 1, "broken"), ("./typo", 1, "broken"), ("typo", 1, "broken"), ("owner/name-8B", 0, "unknown")],
)
def test_a_checkpoint_that_is_not_here_is_missing_or_a_hubs(capsys: Captured, model: str, code: int, state: str):
    for option in ("--model", "--model-path", "--draft"):
        found = findings(capsys, option, model)
        assert (found[0], found[1]["draft"]["state"]) == (code, state)


@pytest.mark.parametrize(("value", "code"), [("1", 1), ("true", 0)])
def test_only_what_sglang_heeds_is_fatal(capsys: Captured, monkeypatch: pytest.MonkeyPatch, value: str, code: int):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", value)
    assert findings(capsys)[0] == code


def test_an_empty_policy_variable_is_an_unset_one(capsys: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_POLICY", "")
    code, found = findings(capsys)
    assert code == 0 and found["policy"]["detail"].startswith("adaptive")


def test_the_doctor_speaks_of_a_draft_without_a_target(capsys: Captured, tmp_path: Path):
    draft = str(write_draft(tmp_path / "draft"))
    assert "block of 5" in findings(capsys, "--draft", draft)[1]["draft"]["detail"]
    code, found = findings(capsys, "--draft", str(tmp_path / "nothing"))
    assert (code, found["draft"]["state"]) == (1, "broken")


def test_lint_says_what_is_wrong_and_where(capsys: Captured, tmp_path: Path):
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text("version: 1\nschedule: {kind: fixed, dept: 3}\n")
    assert main(["policy", "lint", "off", "fixed-5"]) == 0
    assert capsys.readouterr().out == "off: ok\nfixed-5: ok\n"
    assert main(["policy", "lint", "off", str(faulty)]) == 1
    assert f"{faulty}:2:25: unknown key 'dept'" in capsys.readouterr().out
    assert main(["policy", "lint", "--json", str(faulty)]) == 1
    error = json.loads(capsys.readouterr().out)[0]["error"]
    assert (error["file"], error["line"], error["column"]) == (str(faulty), 2, 25)


def test_show_prints_a_policy_as_written_and_as_understood(capsys: Captured):
    assert main(["policy", "show", "off"]) == 0
    assert capsys.readouterr().out.startswith("# Plain decoding")
    assert main(["policy", "show", "fixed-3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schedule"] == {"kind": "fixed", "depth": 3}


def test_a_mistake_is_one_line_on_stderr(capsys: Captured):
    assert main(["policy", "show", "nothing"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: nothing: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["policy"], ["nothing"], ["policy", "lint"]])
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: Captured):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: dspark-sgl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dspark-sgl po", "policy"),
        ("dspark-sgl policy li", "lint"),
        ("dspark-sgl policy show slo", "slo-interactive"),
        ("dspark-sgl policy lint off --j", "--json"),
        ("dspark-sgl doctor --policy fixed-7 --dr", "--draft"),
    ],
)
def test_a_shell_completes_commands_options_and_policies(typed: str, offered: str, capsys: Captured):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = typed.split()
    script += f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _dspark_sgl; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == offered
    assert done.stderr == ""
