"""Conditions: what is refused and where, and that CEL's answer is the one that the grammar promises."""

import operator
import time
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies.conditions import Surroundings, compile_condition
from dspark_sgl.policies.expressions import MAX_LENGTH, ConditionError, Node, parse_condition
from dspark_sgl.policies.reachability import implies, impossible
from dspark_sgl.policies.signals import SIGNALS, Value

LOAD = {"batch.size": 64.0, "kv.usage": 0.95, "gpu.throttled": False, "request.tier": "batch"}


def holds(text: str, load: Mapping[str, Value] = LOAD) -> bool:
    return compile_condition(text).holds(Surroundings(load.get))


@pytest.mark.parametrize(
    "text",
    [
        "batch.size >= 64 && kv.usage > 0.9",
        "batch.size + 1 > 64.5",
        "batch.size / 128 == 0.5",
        "batch.size in [32, 64]",
        "!gpu.throttled",
        "request.tier != 'interactive' ? kv.usage > .9 : false",
        '-batch.size < - 1e1 && "it\'s" == "it\'s"',
        "((batch.size) == (64))",
    ],
)
def test_conditions_mean_what_they_say(text: str):
    assert holds(text)
    assert not holds(f"!({text})")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu.temp_c > 80", False),
        ("!(gpu.temp_c > 80)", False),
        ("gpu.temp_c > 80 || batch.size > 1", True),
        ("batch.size > 1 || gpu.temp_c > 80", True),
        ("!(gpu.temp_c > 80 && batch.size < 1)", True),
        ("gpu.temp_c > 80 && batch.size > 1", False),
    ],
)
def test_an_absent_signal_decides_only_what_hangs_on_it(text: str, expected: bool):
    assert holds(text) is expected


@pytest.mark.parametrize(
    ("text", "offset", "words"),
    [
        ("batch.sise > 3", 0, "did you mean 'batch.size'?"),
        ("kv.usage > 0.9 && batch > 3", 18, "did you mean 'batch.size'?"),
        ("request.tier == batch", 16, "did you mean"),
        ("request.tier == gold", 16, "text needs quotes"),
        ("net.speed.down == 3", 0, "lists the signals"),
        ("batch.size > 'x'", 13, "'x' is text"),
        ("batch.size == true", 14, "batch.size is a number, True is true or false"),
        ("gpu.throttled > 0", 0, "gpu.throttled is true or false"),
        ("batch.size", 0, "must be true or false; this is a number"),
        ("batch.size > 1 ? 2 : 3", 0, "this is a number"),
        ("gpu.throttled ? 1 : true", 20, "of one type"),
        ("1 < batch.size < 3", 15, "do not chain"),
        ("batch.size >", 12, "expected a signal or a value"),
        ("(batch.size > 3", 15, "expected ')'"),
        ("batch.size > 3 kv.usage", 15, "expected an operator"),
        ("gpu.throttled or true", 14, "did you mean '||'?"),
        ("not gpu.throttled", 0, "did you mean '!'?"),
        ("batch.size = 3", 11, "did you mean '=='?"),
        ("kv.usage > 90%", 13, "unexpected '%'"),
        ("has(batch.size)", 0, "no functions"),
        ("[1, 2].all(x, x > 1)", 6, "unexpected '.'"),
        ("batch.size in 3", 14, "needs a list"),
        ("batch.size in [1, 'x']", 18, "of one type"),
        ("batch.size in ['x']", 14, "two types"),
        ("3u < 2", 0, "not a number"),
        ("0x10 > 1", 0, "not a number"),
        ("1e999 > 1", 0, "not a number"),
        ("request.tier == 'a\\n'", 16, "no backslash"),
        ("request.tier == 'a", 16, "end on its line"),
        ("!" * 60 + "true", 39, "deep"),
        ("true || " * 60 + "true", 400, "100 words"),
        ("x" * (MAX_LENGTH + 1), 0, "1000 characters"),
        ("", 0, "expected a signal"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, offset: int, words: str):
    with pytest.raises(ConditionError) as caught:
        compile_condition(text)
    assert words in caught.value.message
    assert caught.value.offset == offset


# What the operators mean, told a second time. None: an absent signal decides.
_TWO = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def meaning(node: Node, load: Mapping[str, Value]) -> Value | None:
    if node.op in ("literal", "signal"):
        return node.value if node.op == "literal" else load.get(str(node.value))
    if node.op == "in":
        left = meaning(node.parts[0], load)
        return None if left is None else left in [part.value for part in node.parts[1].parts]
    parts = [meaning(part, load) for part in node.parts]
    if node.op == "?":
        return None if parts[0] is None else parts[1] if parts[0] else parts[2]
    if node.op in ("&&", "||"):
        decisive = node.op == "||"
        return decisive if decisive in parts else None if None in parts else not decisive
    if None in parts:
        return None
    if len(parts) == 1:
        return not parts[0] if node.op == "!" else -parts[0]  # type: ignore[operator]
    return _TWO[node.op](*parts)


NAMES = ("batch.size", "kv.usage", "step.ms", "gpu.throttled", "request.tier")
numbers = st.one_of(st.sampled_from(["batch.size", "kv.usage", "step.ms"]), st.sampled_from(["0", "1", "0.5", "7"]))
numbers = st.recursive(numbers, lambda a: st.builds("({} {} {})".format, a, st.sampled_from("+-*"), a), max_leaves=3)
numbers |= st.builds("-{}".format, numbers)
texts = st.sampled_from(["request.tier", "'batch'", '"default"'])
plain = (
    st.builds("{} {} {}".format, numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers)
    | st.builds("{} {} {}".format, texts, st.sampled_from(["==", "!="]), texts)
    | st.builds("{} in [{}, {}]".format, numbers, st.sampled_from("123"), st.sampled_from("456"))
    | st.sampled_from(["true", "false", "gpu.throttled"])
)
conditions = st.recursive(
    plain,
    lambda a: (
        st.builds("({})".format, a)
        | st.builds("!({})".format, a)
        | st.builds("{} {} {}".format, a, st.sampled_from(["&&", "||"]), a)
        | st.builds("({}) ? ({}) : ({})".format, a, a, a)
    ),
    max_leaves=8,
)
values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, 100.0])
loads = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NAMES[:3], values),
        "gpu.throttled": st.booleans(),
        "request.tier": st.sampled_from(["batch", "default"]),
    },
)


@settings(max_examples=500, deadline=None)
@given(conditions, loads)
def test_the_library_answers_as_the_grammar_says(text: str, load: dict[str, Value]):
    try:
        tree = parse_condition(text)
    except ConditionError as error:  # the generator nests beyond the bounds at times
        assert "deep" in error.message or "words" in error.message or "characters" in error.message
        return
    assert holds(text, load) is (meaning(tree, load) is True)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*"&|!<>=+-*/?:()[],.'\" 01e_", *NAMES, "true", " in ", "&&", "||"]), max_size=40))
def test_any_text_is_compiled_or_refused_with_a_place(words: list[str]):
    text = "".join(words)
    start = time.perf_counter()
    try:
        compile_condition(text).holds(Surroundings(LOAD.get))
    except ConditionError as error:
        assert 0 <= error.offset <= len(text)
    assert time.perf_counter() - start < 1


@settings(max_examples=500, deadline=None)
@given(conditions, loads)
def test_what_is_called_impossible_holds_under_no_load(text: str, load: dict[str, Value]):
    try:
        found = impossible(parse_condition(text))
    except ConditionError:
        return
    if found and "always holds" not in found[1]:
        within = {name: min(v, SIGNALS[name].highest) if type(v) is float else v for name, v in load.items()}
        assert meaning(found[0], within) is not True


@settings(max_examples=500, deadline=None)
@given(conditions, conditions, loads)
def test_implication_is_never_claimed_falsely(narrow: str, wide: str, load: dict[str, Value]):
    try:
        one, other = parse_condition(narrow), parse_condition(wide)
    except ConditionError:
        return
    if implies(one, other) and meaning(one, load) is True:
        assert meaning(other, load) is True


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("batch.size >= 128", "batch.size >= 64"),
        ("batch.size > 64", "64 <= batch.size"),
        ("batch.size == 3", "batch.size < 4"),
        ("batch.size > 5 && kv.usage > 0.9", "kv.usage > 0.8"),
        ("batch.size > 5", "batch.size > 3 || gpu.throttled"),
        ("gpu.throttled", "gpu.throttled"),
    ],
)
def test_implications_that_people_write_are_found(narrow: str, wide: str):
    assert implies(parse_condition(narrow), parse_condition(wide))
    assert narrow == wide or not implies(parse_condition(wide), parse_condition(narrow))


def test_every_signal_has_a_name_a_source_and_a_meaning():
    for name, signal in SIGNALS.items():
        assert signal.name == name
        assert signal.source
        assert signal.doc
        assert signal.unit or signal.kind != "number" or name == "request.temperature"
        assert (signal.scope == "request") == name.startswith("request.")


def test_a_comparison_with_what_is_no_number_does_not_hold():
    """0/0, when nobody waits and one request runs; CEL would raise."""
    condition = compile_condition("queue.length / (batch.size - 1) > 2")
    signals = {"queue.length": 0.0, "batch.size": 1.0}
    assert condition.holds(Surroundings(signals.get)) is False
    signals["batch.size"], signals["queue.length"] = 2.0, 3.0
    assert condition.holds(Surroundings(signals.get)) is True
