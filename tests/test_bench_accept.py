"""`dspark-sgl bench accept`: prompts are read, rounds counted right; a mistake is one line before a server starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_sgl.accept_counts import AcceptCounts, by_domain
from dspark_sgl.cli import main
from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.prompts import Prompt, read_prompts
from dspark_sgl.recorder import RecordedRound

from .draft_checkpoints import CONFIG, TARGET, write_draft

Captured = pytest.CaptureFixture[str]


def rounds(*pairs: tuple[int, int]) -> list[RecordedRound]:
    """(offered, accepted) of each."""
    return [RecordedRound("a", 1.0, offered, accepted, None) for offered, accepted in pairs]


def test_acceptance_is_counted_where_a_draft_was_put_to_the_test():
    found = AcceptCounts.of(rounds((3, 3), (3, 1), (3, 0), (1, 1), (2, 2)))
    assert (found.rounds, found.tokens, found.accepted_length) == (5, 12, 2.4)
    # Draft 2: reached by (3, 3), (3, 1) and (2, 2), not where only one draft was offered; draft 3: by (3, 3) alone.
    assert found.reached == (5, 3, 1)
    assert found.accepted == (4, 2, 1)
    assert found.by_position == [4 / 5, 2 / 3, 1.0]


def test_the_branches_of_trees_are_counted_by_what_went_before():
    def tree(offered: int, *ranks: int) -> RecordedRound:
        return RecordedRound("a", 0.0, offered, len(ranks), None, nodes=8, ranks=list(ranks))

    found = AcceptCounts.of([tree(3, 0, 1), tree(2, 2), tree(1), tree(3, 1, 0, 0), *rounds((2, 2))])
    assert found.accepted_length == (3 + 2 + 1 + 4 + 3) / 5
    # Sides: three accepted; the likeliest child failed there, and at the ends of the first three rounds.
    # After a likeliest child: 0 -> 1 and 0 -> 0 go on. After a side: 1 ends, 2 ends, 1 -> 0 goes on.
    assert found.entry()["tree"] == {
        "nodes": 8.0,
        "side_accepted": 3 / 6,
        "continued_after_first": 1.0,
        "continued_after_side": 1 / 3,
    }
    assert "tree" not in AcceptCounts.of(rounds((2, 2))).entry()


def test_a_draft_that_was_never_reached_has_no_share():
    assert AcceptCounts.of(rounds((2, 0), (2, 0))).by_position == [0.0, None]
    assert AcceptCounts.of([]).entry()["accepted_length"] is None


def test_the_macro_average_weighs_domains_alike():
    found = by_domain({"math": rounds((2, 2)), "chat": rounds(*[(2, 0)] * 9), "silent": []})
    assert found["overall"]["accepted_length"] == pytest.approx(1.2)
    assert found["macro"] == 2.0
    assert found["domains"]["silent"]["rounds"] == 0


def test_a_limit_takes_domains_in_turn(tmp_path: Path):
    file = tmp_path / "some.jsonl"
    rows = [{"prompt": f"m{i}", "domain": "math"} for i in range(3)] + [{"prompt": "x"}, {"prompt": "y"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_prompts(file, 3) == [Prompt("math", "m0"), Prompt("some", "x"), Prompt("math", "m1")]
    assert len(read_prompts(file)) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\nnope', ":2:1: is not JSON"),
        ('{"promt": "a"}', ':1:1: has no text under "prompt"'),
        ("[1]", ':1:1: has no text under "prompt"'),
        ('{"prompt": "a", "domain": 3}', '"domain" must be text, not 3'),
    ],
)
def test_a_faulty_prompt_is_named(tmp_path: Path, text: str, words: str):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(PolicyError, match=r"p\.jsonl") as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "{tmp}/none.jsonl"], "none.jsonl: prompts cannot be read: No such file"),
        (["--algorithm", "DSPRK"], "--algorithm: 'DSPRK' is unknown; there are"),
        (["--model", "/nowhere/at/all"], "--model: /nowhere/at/all: no such folder"),
        (["--model-path", "./typo"], "--model: ./typo: no such folder; name one, or a model of a hub as owner/name"),
        (["--draft", "./none"], "--draft: ./none: no such folder"),
        (["--draft", "{tmp}/wrong"], "hidden_size is 16, the target has"),
        (["--policy", "fixd-3"], "did you mean 'fixed-3'?"),
        (["--temperature=0,-1"], "--temperature: must be at least 0"),
        (["--json", "{tmp}/no/out.json"], "--json: {tmp}/no/out.json cannot be written"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_server_starts(
    arguments: list[str], words: str, tmp_path: Path, capsys: Captured
):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    write_draft(tmp_path / "wrong", CONFIG | {"hidden_size": 16})
    default = ["--prompts", f"{tmp_path}/p.jsonl", "--model", f"{tmp_path}/target"]
    assert main(["bench", "accept", *default, *(word.format(tmp=tmp_path) for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert words.format(tmp=tmp_path) in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["accept"],
        ["accept", "--prompts", "p", "--limit", "0"],
        ["accept", "--prompts", "p", "--temperature", "0;1"],
    ],
)
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: Captured):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    assert "usage: dspark-sgl bench" in capsys.readouterr().err
