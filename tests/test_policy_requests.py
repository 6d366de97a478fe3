"""What a request may ask for, and the one line it gets when it asks for something else."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_sgl.policies import RequestOptions, parse_request_options


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"dspark": None}, {"dspark": {}}])
def test_a_request_that_says_nothing_gets_the_defaults(params):
    assert parse_request_options(params) == RequestOptions()


@pytest.mark.parametrize("depth", [3, 3.0])
def test_a_request_may_set_depth_and_tier(depth):
    params = {"dspark": {"max_depth": depth, "tier": "interactive"}, "other": 1}
    assert parse_request_options(params) == RequestOptions(3, "interactive")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "must be an object"),
        ([], "must be an object"),
        ({"maxdepth": 3}, "did you mean 'max_depth'?"),
        ({"x" * 500: 3}, "unknown field"),
        ({"max_depth": -1}, "0 to 64"),
        ({"max_depth": 65}, "0 to 64"),
        ({"max_depth": True}, "0 to 64"),
        ({"max_depth": 3.5}, "0 to 64"),
        ({"max_depth": float("inf")}, "0 to 64"),
        ({"max_depth": "3"}, "0 to 64"),
        ({"tier": 3}, "tier must be text"),
        ({"tier": ""}, "tier must be text"),
        ({"tier": "x" * 65}, "tier must be text"),
        ({"tier": "a\nb"}, "tier must be text"),
    ],
)
def test_a_bad_value_is_one_line(value, words):
    with pytest.raises(ValueError, match="custom_params.dspark") as caught:
        parse_request_options({"dspark": value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["max_depth", "tier", "max_depht", "x"])


@given(JSON | st.dictionaries(FIELDS, JSON, max_size=3))
def test_whatever_a_client_sends_is_taken_or_refused_in_one_line(value):
    try:
        options = parse_request_options({"dspark": value})
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert options.max_depth is None or 0 <= options.max_depth <= 64
        assert options.tier is None or 1 <= len(options.tier) <= 64


@pytest.mark.parametrize("value", [["x" * 10] * 10**6, {"max_depth": list(range(10**6))}, {"tier": {"a": "b" * 10**8}}])
def test_megabytes_are_not_written_out_to_be_refused(value):
    tracemalloc.start()
    with pytest.raises(ValueError, match="custom_params.dspark"):
        parse_request_options({"dspark": value})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
