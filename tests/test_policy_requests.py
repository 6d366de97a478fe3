"""What a request may ask for, and the one line it gets when it asks for something else."""

import pytest

from dspark_sgl.policies import RequestOptions, parse_request_options


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"dspark": None}, {"dspark": {}}])
def test_a_request_that_says_nothing_gets_the_defaults(params):
    assert parse_request_options(params) == RequestOptions()


def test_a_request_may_set_depth_and_tier():
    params = {"dspark": {"max_depth": 3, "tier": "interactive"}, "other": 1}
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
        ({"max_depth": 3.0}, "0 to 64"),
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
