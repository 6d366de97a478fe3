"""docs/policies.md: complete, and every policy in it is one that the parser takes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_sgl.policies import SIGNALS, PolicyError, parse_policy, shipped_names
from dspark_sgl.policies.grammar import Named, Record, Variants, Word
from dspark_sgl.policies.reader import POLICY
from dspark_sgl.policies.rule_reader import Rules

TEXT = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
POLICIES = [block for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "version: 1" in block]
RECIPES = TEXT.partition("## Five recipes")[2].partition("## Every key")[0]
WORDS = set(re.findall(r"`([^`\n]+)`", TEXT))


def vocabulary(reader: Any, path: str) -> Iterator[str]:
    """Every key by its path, and every word that may stand as a value."""
    match reader:
        case Record():
            for key in reader.keys:
                here = f"{path}.{key.name}".lstrip(".")
                yield here
                yield from vocabulary(key.type, here)
        case Variants():  # the documentation lists a kind's keys beside the kind
            yield "kind"
            for kind, record in reader.kinds.items():
                yield kind
                for key in record.keys:
                    yield key.name
                    yield from vocabulary(key.type, "")
        case Named():
            yield from vocabulary(reader.entry, f"{path}.NAME")
        case Rules():
            yield from vocabulary(reader.rule, f"{path}[]")
        case Word():
            yield from reader.options


def settings(path: str) -> str:
    """What a rule sets is documented as a part of the policy."""
    return path.removeprefix("rules[].set.")


def test_every_key_and_every_word_is_documented():
    assert {word for word in vocabulary(POLICY, "") if settings(word) not in WORDS} == set()


def test_every_signal_is_documented_as_it_is_declared():
    for signal in SIGNALS.values():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{signal.name}` |"))
        assert row.endswith(f"| {signal.source} | {signal.doc} |")
        assert signal.unit in row


def test_every_shipped_policy_is_mentioned():
    for name in shipped_names():
        assert name in WORDS or re.fullmatch(r"fixed-[2-6]", name)


@pytest.mark.parametrize("text", POLICIES)
def test_every_policy_in_the_text_is_sound(text: str):
    parse_policy(text)


def test_there_are_five_recipes_and_the_tutorial_starts_from_one_line():
    assert RECIPES.count("### ") == RECIPES.count("```yaml") == 5
    assert POLICIES[0].count("\n") == 1


def test_the_python_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    code = TEXT.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.strip().rpartition("# ")[2]


def test_the_lint_example_is_real():
    mine = next(text for text in POLICIES if text.endswith("depth: {max: 5}\n"))
    with pytest.raises(PolicyError) as caught:
        parse_policy(mine + "rules:\n  - when: batch.sise > 8\n    set: {depth: {max: 1}}\n", "mine.yaml")
    assert f"\n{caught.value}\n" in TEXT
