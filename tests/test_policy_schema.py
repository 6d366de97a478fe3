"""The schema for editors: in step with the parser, and never stricter or laxer than it where a schema can tell."""

import json
from importlib import resources

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies import PolicyError, parse_policy, shipped_names
from dspark_sgl.policies.schema import policy_schema, schema_text
from dspark_sgl.policies.shipped import policy_source

VALIDATOR = jsonschema.Draft202012Validator(policy_schema())


def valid(text: str | bytes) -> bool:
    document = json.loads(json.dumps(yaml.safe_load(text)))  # as an editor sees it: keys are strings
    return VALIDATOR.is_valid(document)


def test_the_shipped_schema_is_the_one_that_the_grammar_makes():
    assert (resources.files("dspark_sgl.policies_yaml") / "policy.schema.json").read_text() == schema_text()
    VALIDATOR.check_schema(policy_schema())


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_policy_is_valid(name: str):
    assert valid(policy_source(name)[1])


HEAD = "version: 1\nschedule: {kind: throughput}\n"


@pytest.mark.parametrize(
    "text",
    [
        "version: 2\nschedule: {kind: throughput}",
        "version: 1",
        "version: 1\nschedule: {kind: fixed, dept: 3}",
        "version: 1\nschedule: {kind: threshold, confidence: 1}",
        "version: 1\nschedule: {kind: table, by: request.tier, points: {1: 2}}",
        "version: 1\nschedule: {kind: table, by: batch.size, points: {few: 2}}",
        HEAD + "depth: {max: blok}",
        HEAD + "rules: [{when: true, set: {}}]",
        HEAD + "tiers: {a b: {}}",
        HEAD + "accept: {method: both}",
        HEAD + "colour: red",
    ],
)
def test_editor_and_parser_refuse_the_same(text: str):
    assert not valid(text)
    with pytest.raises(PolicyError):
        parse_policy(text)


leaves = st.sampled_from([0, 1, 2, 3, 65, -1, 0.5, 1.5, True, "block", "auto", "x", "", None])
schedules = st.fixed_dictionaries(
    {"kind": st.sampled_from(["fixed", "threshold", "table", "throughput", "slo", "x"])},
    optional={
        **dict.fromkeys(["confidence", "tokens_per_second_per_user", "extra"], leaves),
        "depth": st.integers(-1, 70),
        "by": st.sampled_from(["batch.size", "step.ms", "gpu.throttled", "x"]),
        "points": st.dictionaries(st.integers(0, 9), st.integers(-1, 65), max_size=3).map(
            lambda points: dict(sorted(points.items()))
        ),
        "causality": st.sampled_from(["auto", "early_stop", "lagged", "never"]),
    },
)
policies = st.fixed_dictionaries(
    {"version": st.just(1), "schedule": schedules},
    optional={
        "shape": st.fixed_dictionaries({}, optional={"kind": leaves, "max_nodes": leaves, "branch": leaves}),
        "depth": st.fixed_dictionaries({}, optional={"max": leaves}),
        "cost": st.fixed_dictionaries({}, optional={"margin": leaves}),
        "calibration": st.fixed_dictionaries({}, optional={"online": leaves}),
        "tiers": st.dictionaries(st.sampled_from(["a", "b c"]), st.fixed_dictionaries({}, optional={"weight": leaves})),
    },
)


@settings(max_examples=1000, deadline=None)
@given(policies)
def test_editor_and_parser_agree_on_structure(document: dict):
    text = yaml.safe_dump(document, sort_keys=False)
    try:
        parse_policy(text)
    except PolicyError as error:
        left_to_the_parser = ("needs one of depth and nodes", "does nothing for a chain")
        if not any(words in error.message for words in left_to_the_parser):
            assert not valid(text), error
    else:
        assert valid(text)
