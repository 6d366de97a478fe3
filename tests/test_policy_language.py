"""The policy language: faults are named with their place, and nothing but a PolicyError ever comes out."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies import (
    Accept,
    FixedSchedule,
    Policy,
    PolicyError,
    RuleBook,
    Snapshot,
    find_policy,
    load_policy,
    parse_policy,
    shipped_names,
)
from dspark_sgl.policies.shipped import policy_source

HEAD = "version: 1\n"
FIXED = HEAD + "schedule: {kind: fixed, depth: 3}\n"
TABLE = HEAD + "schedule: {kind: table, by: batch.size,\n"


def refusal(text: str | bytes) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_whole_policy():
    text = FIXED + "name: mine\ndescription: three\naccept: {method: match}\n"
    assert parse_policy(text) == Policy("mine", FixedSchedule(3), Accept("match"), "three")


def test_a_policy_without_a_name_is_called_by_its_file(tmp_path: Path):
    (tmp_path / "night.yaml").write_text(FIXED)
    assert load_policy(tmp_path / "night.yaml") == Policy("night", FixedSchedule(3))


@pytest.mark.parametrize("depth", [0, 64])
def test_depth_may_be_at_its_bounds(depth: int):
    assert parse_policy(HEAD + f"schedule: {{kind: fixed, depth: {depth}}}").schedule.depth == depth


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", "1:1", "empty"),
        ("[]", "1:1", "must be a mapping"),
        ("version: 1", "1:1", "needs the key 'schedule'"),
        ("schedule: {kind: fixed, depth: 3}", "1:1", "needs the key 'version'"),
        ("version: 2\nschedule: {kind: fixed, depth: 3}", "1:10", "version 2"),
        (HEAD + "schedul: {}", "2:1", "did you mean 'schedule'?"),
        (HEAD + "schedule: 3", "2:11", "schedule must be a mapping"),
        (HEAD + "schedule: {kind: fixed, dept: 3}", "2:25", "did you mean 'depth'?"),
        (HEAD + "schedule: {kind: fixed}", "2:11", "needs one of depth and nodes"),
        (HEAD + "schedule: {kind: fixed, depth: 1, nodes: 1}", "2:11", "needs one of depth and nodes"),
        (HEAD + "schedule: {kind: fixed, nodes: 257}", "2:32", "from 0 to 256"),
        (HEAD + "schedule: {kind: threshold}", "2:11", "needs the key 'confidence'"),
        (HEAD + "schedule: {kind: threshold, confidence: 1}", "2:41", "above 0 and below 1, not '1'"),
        (HEAD + "schedule: {kind: threshold, confidence: high}", "2:41", "a number above 0"),
        (HEAD + "schedule: {kind: threshold, confidence: .nan}", "2:41", "a number above 0"),
        (HEAD + "schedule: {kind: threshold, depth: 3}", "2:29", "unknown key 'depth'"),
        (HEAD + "schedule: {kind: slo, tokens_per_second_per_user: 0}", "2:51", "above 0"),
        (TABLE + "points: {1: 2, 1: 3}}", "3:16", "given twice"),
        (TABLE + "points: {4: 2, 1: 3}}", "3:16", "must increase; 1 comes after 4"),
        (TABLE + "points: {few: 2}}", "3:10", "a number from 0"),
        (TABLE + "points: {1: 2.5}}", "3:13", "whole number"),
        (TABLE + "points: {}}", "3:9", "1 to 64 entries"),
        (TABLE + "points: [1, 2]}", "3:9", "a mapping"),
        (TABLE.replace("batch.size", "batch.sise") + "points: {1: 2}}", "2:29", "did you mean 'batch.size'?"),
        (TABLE.replace("batch.size", "gpu.throttled") + "points: {1: 2}}", "2:29", "must be one of"),
        (TABLE.replace("batch.size", "kv.usage") + "points: {50: 2}}", "3:9", "never reaches 50"),
        (FIXED + "depth: {min: 3, max: 2}", "3:14", "depth.min is 3, above its max, 2"),
        (FIXED + "depth: {max: blok}", "3:14", "whole number"),
        (FIXED + "shape: {branch: 0}", "3:17", "from 1 to 16"),
        (FIXED + "cost: {margin: 1.5}", "3:16", "from 0 to 1"),
        (FIXED + "calibration: {online: !!bool {}}", "3:23", "tags are not allowed"),
        (FIXED + "calibration: {online: 1}", "3:23", "must be true or false"),
        (FIXED + "calibration: {online: yes}", "3:23", "calibration.online: write true or false, not yes"),
        (FIXED + "tiers: {a b: {}}", "3:9", "may hold"),
        (FIXED + "tiers: {a: {min_depth: 3, max_depth: 2}}", "3:24", "above max_depth"),
        (FIXED + "depth: {max: 2}\ntiers: {a: {min_depth: 3}}", "4:12", "above the policy's depth.max, 2"),
        (FIXED + "tiers: {a: {wait: 3}}", "3:13", "did you mean 'weight'?"),
        (HEAD + "schedule: {kind: fixed, depth: 65}", "2:32", "from 0 to 64, not 65"),
        (HEAD + "schedule: {kind: fixed, depth: -1}", "2:32", "from 0 to 64, not -1"),
        (HEAD + "schedule: {kind: fixed, depth: 1.5}", "2:32", "whole number"),
        (HEAD + "schedule: {kind: fixed, depth: yes}", "2:32", "whole number"),
        (HEAD + "schedule: {kind: fixed, depth: 010}", "2:32", "whole number"),
        (HEAD + "schedule: {kind: fixed, depth: 1:30}", "2:32", "whole number"),
        (HEAD + "schedule: {kind: fixed, depth: '3'}", "2:32", "without quotes"),
        (HEAD + "schedule: {kind: fixed, depth: [3]}", "2:32", "not a list"),
        (HEAD + "schedule: {kind: fixed, depth: 3, depth: 4}", "2:35", "given twice"),
        (HEAD + "schedule: {kind: fixt, depth: 3}", "2:18", "did you mean 'fixed'?"),
        (FIXED + "accept: {method: rejections}", "3:18", "did you mean 'rejection'?"),
        (FIXED + "accept: match", "3:9", "accept must be a mapping"),
        (FIXED + "name: off", "3:7", "put it in quotes"),
        (FIXED + "name: 'a b'", "3:7", "name may hold"),
        (FIXED + "name: ''", "3:7", "1 to 64 characters"),
        (FIXED + "name: ", "3:", "empty"),
        (FIXED + "name: &a x", "3:7", "anchors and aliases"),
        (FIXED + "a: *b", "3:4", "anchors and aliases"),
        (FIXED + "<<: {}", "3:1", "unknown key '<<'"),
        (FIXED + "? [a]\n: 1", "3:3", "must be a word"),
        (FIXED + "name: !!python/object/apply:os.getcwd []", "3:7", "tags are not allowed"),
        (HEAD + "schedule: !!python/object:os.system {kind: throughput}", "2:11", "tags are not allowed"),
        ("!foo\n" + FIXED, "1:1", "tags are not allowed"),
        (
            HEAD + "schedule: {depth: 3}",
            "2:11",
            "needs the key 'kind', one of fixed, threshold, table, throughput, slo",
        ),
        ("version: 2\nfancy: 1", "1:10", "version 2 of the language needs a newer dspark-sgl"),
        ("version: 0\n", "1:10", "from 1"),
        (HEAD + "schedule: {kind: fixed, depth: 0x5}", "2:32", "in plain decimal digits, not '0x5'"),
        (HEAD + "schedule: {kind: fixed, depth: +5}", "2:32", "in plain decimal digits, not '+5'"),
        (
            HEAD + "schedule: {kind: fixed, depth: 99999999999999999999}",
            "2:32",
            "from 0 to 64, not 99999999999999999999",
        ),
        (HEAD + "schedule: {kind: threshold, confidence: .5}", "2:41", "schedule.confidence: write 0.5"),
        (HEAD + "schedule: {kind: threshold, confidence: '0.5'}", "2:41", "without quotes"),
        (FIXED + "description: 2024-01-01", "3:14", "as a date: put it in quotes"),
        (FIXED + "depth: null", "3:8", "depth must be a mapping (key: value), not nothing"),
        (FIXED + "shape: {kind: chain, max_nodes: 5}", "3:33", "shape.max_nodes does nothing for a chain"),
        (FIXED + "a: " + "[" * 40, "3:", "nested too deeply"),
        (FIXED + "---\n" + FIXED, "3:1", "not valid YAML"),
        (FIXED + "accept: {method", "3:16", "not valid YAML"),
        (FIXED + "name: \x01", "3:7", "control character"),
        (FIXED + 'name: "\\UFFFFFFFF"', "", "not valid YAML"),
        (FIXED.encode() + b"name: \xff", "3:7", "not valid UTF-8"),
        (FIXED + "#" * 70_000, "", "larger than 64 KiB"),
    ],
)
def test_a_fault_is_named_with_its_place(text: str | bytes, place: str, words: str):
    line = refusal(text)
    assert words in line
    assert line.startswith(f"p.yaml:{place}" if place else "p.yaml:")


def test_every_shipped_policy_loads_under_its_own_name():
    fixed = [f"fixed-{n}" for n in range(1, 8)]
    adapting = {"adaptive", "latency", "throughput", "slo-interactive", "long-context", "power-capped"}
    assert set(shipped_names()) == {*fixed, *adapting, "off"}
    for name in shipped_names():
        policy = find_policy(name)
        assert policy.name == name
        assert policy.description
        if name not in adapting:
            assert policy.schedule == FixedSchedule(0 if name == "off" else int(name[-1]))


def test_every_shipped_policy_says_when_to_use_it():
    for name in shipped_names():
        header = policy_source(name)[1].decode().partition("version:")[0]
        assert re.search(r"Use it (when|where|for|to)\b|[Ff]irst guess|[Uu]se it", header), name


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("off").write_text(FIXED)
    assert find_policy("off").schedule.depth == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fixd-5", "did you mean 'fixed-5'?"),
        ("nothing-like-it", "shipped: adaptive, "),
        ("./fixed-5.yaml", "no such policy file; did you mean 'fixed-5'?"),
        ("", "no policy file"),
        ("x" * 5000, "no policy file"),
        ("a\0b", "no policy file"),
    ],
)
def test_an_unknown_policy_is_one_line(name: str, words: str):
    with pytest.raises(PolicyError) as caught:
        find_policy(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path: Path):
    for read in (load_policy, lambda path: find_policy(str(path))):
        with pytest.raises(PolicyError, match=f"{tmp_path}: is a folder, not a policy file"):
            read(tmp_path)


def test_the_name_of_a_file_is_held_to_what_a_name_may_be(tmp_path: Path):
    file = tmp_path / "my policy.yaml"
    file.write_text(FIXED)
    with pytest.raises(PolicyError, match=r":1:1: the file's name .* 'my policy' may hold letters, .* the key 'name'"):
        load_policy(file)
    file.write_text(FIXED + "name: mine\n")
    assert load_policy(file).name == "mine"


def test_a_part_that_says_nothing_is_as_by_default():
    assert parse_policy(FIXED + "accept: {}\ntiers: {a: {max_depth: block}}\n").accept == Accept("auto")


SEEDS = [policy_source(name)[1].decode() for name in ("adaptive", "slo-interactive", "power-capped")]
SEEDS.append(FIXED + 'name: "mine"\ndescription: >\n  folded\n  text\naccept: {method: auto}  # comment\n')
BITS = ["\t", "'", '"', "[", "{", "}", ":", "&a ", "*a", "!!int ", "!x ", "? ", "- ", "|", ">", "%YAML 1.9\n", "\n  "]
BITS += ["\0", "\u2028", "\ud800", "\\", '"\\x', '"\\uD800"', "0x10", "1e999", "9" * 5000, "---\n", "...", "<<: "]
BITS += [
    "&& ",
    "||",
    "(" * 99,
    "!" * 999,
    "?",
    " in [1]",
    "batch.size",
    "request.tier",
    "== 'x'",
    ".all(x, x)",
    "- " * 500,
]


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 6), st.one_of(st.sampled_from(BITS), st.text(max_size=9))),
        min_size=1,
        max_size=4,
    ),
)
def test_mutated_policies_load_or_are_refused_in_one_line(text: str, edits: list[tuple[float, int, str]]):
    for place, removed, added in edits:
        at = int(place * len(text))
        text = text[:at] + added + text[at + removed :]
    start = time.perf_counter()
    try:
        policy = parse_policy(text)
        RuleBook(policy, block=7).batch(Snapshot({"batch.size": 8.0, "kv.usage": 0.5}))
    except PolicyError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
        assert error.line <= len(re.findall("[\n\r\x85\u2028\u2029]", text)) + 1
    assert time.perf_counter() - start < 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(data: bytes):
    try:
        parse_policy(data)
    except PolicyError as error:
        assert "\n" not in str(error)
