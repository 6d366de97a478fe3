"""Rules: which one is in force, what a request may have, and the rules that are refused at load."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.policies import (
    Depth,
    FixedSchedule,
    PolicyError,
    RequestLimits,
    RequestSignals,
    RuleBook,
    Shape,
    Snapshot,
    Tier,
    parse_policy,
)
from dspark_sgl.policies.limits import fold

HEAD = "version: 1\nschedule: {kind: fixed, depth: 5}\naccept: {method: rejection}\n"
BLOCK = 7
UNKNOWN = float("nan")


def book(text: str) -> RuleBook:
    return RuleBook(parse_policy(HEAD + text, "p.yaml"), BLOCK)


def request(tier: str = "default", context_len: int = 100, accept_length: float = 2.0) -> RequestSignals:
    return RequestSignals(tier, context_len, output_len=10, accept_length=accept_length, temperature=0.0)


def limits(text: str, load: dict[str, float | bool], *requests: RequestSignals) -> list[RequestLimits]:
    rules, snapshot = book(text), Snapshot(load)
    active = rules.batch(snapshot)
    return [rules.request(active, snapshot, each) for each in requests or [request()]]


def test_without_rules_a_policy_is_what_it_says():
    rules = book("depth: {min: 1, max: 4}\nshape: {kind: tree}\n")
    active = rules.batch(Snapshot({}))
    assert (active.schedule, active.shape, active.rule) == (FixedSchedule(5), Shape("tree"), None)
    assert not rules.per_request
    assert rules.request(active, Snapshot({}), request()) == RequestLimits(4, min_depth=1)


RULES = """
rules:
  - when: gpu.throttled
    set: {depth: {max: 2}}
  - when: request.context_len > 1000
    set: {depth: {max: 1}}
  - when: batch.size >= 64
    set: {schedule: {kind: fixed, depth: 1}, depth: {max: 3}}
"""


def test_the_first_rule_that_matches_wins_for_the_batch_and_for_each_request():
    short, long = request(context_len=10), request(context_len=5000)
    assert limits(RULES, {"batch.size": 1, "gpu.throttled": False}, short, long) == [
        RequestLimits(BLOCK),
        RequestLimits(1),
    ]
    assert limits(RULES, {"batch.size": 64, "gpu.throttled": False}, short, long) == [
        RequestLimits(3),
        RequestLimits(1),
    ]
    assert limits(RULES, {"batch.size": 64, "gpu.throttled": True}, short, long) == [RequestLimits(2)] * 2


def test_a_rule_for_requests_leaves_the_schedule_to_the_rules_for_the_batch():
    rules = book(RULES)
    assert rules.per_request
    crowded = Snapshot({"batch.size": 100, "gpu.throttled": False})
    active = rules.batch(crowded)
    assert (active.schedule, active.rule) == (FixedSchedule(1), 2)
    assert rules.request(active, crowded, request(context_len=5000)) == RequestLimits(1)


def test_a_rule_that_needs_an_absent_signal_is_announced_and_does_not_fire():
    rules = book(RULES)
    assert rules.missing({"batch.size"}) == ["rule at line 6 (gpu.throttled): gpu.throttled cannot be read here"]
    assert rules.batch(Snapshot({"batch.size": 64})).rule == 2
    text = "rules: [{when: request.accept_length < 1.2, set: {depth: {max: 1}}}]"
    assert limits(text, {}, request(accept_length=UNKNOWN), request(accept_length=1.1)) == [
        RequestLimits(BLOCK),
        RequestLimits(1),
    ]


def test_a_table_by_an_absent_signal_is_announced():
    table = "{kind: table, by: gpu.util, points: {0: 7, 0.9: 1}}"
    rules = book(f"rules: [{{when: batch.size > 8, set: {{schedule: {table}}}}}]")
    assert rules.missing({"batch.size"}) == [
        "rule at line 4, its table: gpu.util cannot be read here; the shallowest point holds"
    ]
    rules = RuleBook(parse_policy(f"version: 1\nschedule: {table}\n"), BLOCK)
    assert rules.missing({"gpu.util"}) == []
    assert rules.missing({"batch.size"}) == [
        "the policy's table: gpu.util cannot be read here; the shallowest point holds"
    ]


def test_what_a_rule_leaves_out_stays_as_the_policy_says():
    text = "depth: {min: 2, max: 5}\nrules: [{when: batch.size > 8, set: {depth: {max: block}}}]"
    assert limits(text, {"batch.size": 9}) == [RequestLimits(BLOCK, min_depth=2)]
    assert limits(text, {"batch.size": 8}) == [RequestLimits(5, min_depth=2)]


def test_tiers_bound_and_weigh_their_requests():
    text = "tiers: {fast: {weight: 2, min_depth: 2}, slow: {max_depth: 1}, default: {weight: 0.5}}"
    assert limits(text, {}, request("fast"), request("slow"), request("default"), request("unheard-of")) == [
        RequestLimits(BLOCK, min_depth=2, weight=2.0),
        RequestLimits(1),
        RequestLimits(BLOCK, weight=0.5),
        RequestLimits(BLOCK, weight=0.5),
    ]


WHENS = [
    "request.context_len > 100 && request.accept_length < 1.5",
    "request.context_len in [10, 50] || request.output_len == 3",
    "request.context_len / 2 > request.output_len",
    "request.output_len * 10 < 40",
    "batch.size > 8 && request.accept_length != 2",
    "request.context_len > batch.size",
    "7 == request.context_len",
    "request.tier == 'fast' ? request.temperature > 0.5 : request.temperature > 0.9",
]
asking = st.builds(
    RequestSignals,
    st.sampled_from(["fast", "default", "unheard-of"]),
    st.sampled_from([6, 7, 8, 10, 49, 50, 100, 101]),
    st.integers(0, 5),
    st.sampled_from([1.0, 1.5, 2.0, UNKNOWN]),
    st.sampled_from([0.0, 0.5, 0.7, 1.0]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(WHENS), unique=True, min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from([1.0, 9.0, 60.0]), asking, st.none() | st.integers(0, 7)), max_size=20),
)
def test_what_a_book_remembers_never_changes_its_answer(whens, asked):
    rules = "".join(f'  - {{when: "{when}", set: {{depth: {{max: {i}}}}}}}\n' for i, when in enumerate(whens))
    text = HEAD + "tiers: {fast: {min_depth: 2}}\nrules:\n" + rules
    policy = parse_policy(text)
    book = RuleBook(policy, BLOCK)
    for size, signals, max_depth in asked:
        load = Snapshot({"batch.size": size})
        fresh = RuleBook(policy, BLOCK)
        expected = fresh.request(fresh.batch(load), load, signals, max_depth)
        assert book.request(book.batch(load), load, signals, max_depth) == expected


depths = st.none() | st.integers(0, 64)


@given(depths, depths, st.integers(0, 64), depths, depths, st.integers(1, 16))
def test_a_maximum_always_beats_a_minimum(low, high, tier_low, tier_high, asked, block):
    folded = fold(Depth(low, high), Tier(1.0, tier_low, tier_high), asked, block)
    maxima = [limit for limit in (high, tier_high, asked, block) if limit is not None]
    assert folded.max_depth == min(maxima)
    assert folded.min_depth == min(max(low or 0, tier_low), min(maxima))


@pytest.mark.parametrize(
    ("rules", "place", "words"),
    [
        ("{when: batch.sise > 3, set: {depth: {max: 1}}}", "6:12", "did you mean 'batch.size'?"),
        ("{when: 'batch.sise > 3', set: {depth: {max: 1}}}", "6:13", "did you mean 'batch.size'?"),
        ("{when: kv.usage > 0.5 && batch.size > 'x', set: {depth: {max: 1}}}", "6:43", "'x' is text"),
        ("{when: kv.usage, set: {depth: {max: 1}}}", "6:12", "must be true or false"),
        ("{when: kv.usage >, set: {depth: {max: 1}}}", "6:22", "expected a signal"),
        ("when: !gpu.throttled\n    set: {depth: {max: 1}}", "6:11", "put it in quotes"),
        ("{when: 3, set: {depth: {max: 1}}}", "6:12", "must be text"),
        ("{when: gpu.throttled, set: {}}", "6:32", "is empty"),
        ("{when: gpu.throttled}", "6:5", "needs the key 'set'"),
        ("{when: gpu.throttled, set: {dept: {max: 1}}}", "6:33", "did you mean 'depth'?"),
        ("{when: gpu.throttled, set: {depth: {min: 3, max: 1}}}", "6:46", "above its max"),
        ("{when: request.output_len > 9, set: {schedule: {kind: throughput}}}", "6:52", "may set depth only"),
        ("{when: request.output_len > 9, set: {shape: {kind: tree}}}", "6:49", "may set depth only"),
        ("{when: batch.size > 1, set: {depth: {}}}", "6:33", "set.depth is empty"),
        ("{when: batch.size > 1, set: {depth: {min: 7}}}", "6:41", "min is 7, above the policy's depth.max, 6"),
        ("{when: kv.usage > 90, set: {depth: {max: 1}}}", "6:12", "kv.usage goes from 0 to 1, so this never holds"),
        ("{when: batch.size > 1 && kv.usage < 90, set: {depth: {max: 1}}}", "6:30", "so this always holds"),
        ("{when: 0 > batch.size, set: {depth: {max: 1}}}", "6:12", "batch.size is never below 0, so this never holds"),
        (
            "{when: batch.size > 10 && kv.usage > 0.5 && batch.size < 5, set: {depth: {max: 1}}}",
            "6:12",
            "no value of batch.size satisfies all of this",
        ),
        ("{when: false, set: {depth: {max: 1}}}", "6:12", "never true"),
        ("{when: request.tier == 'fats', set: {depth: {max: 1}}}", "6:28", "did you mean 'fast'?"),
        ("{when: \"request.tier in ['fast', 'gold']\", set: {depth: {max: 1}}}", "6:38", "no tier is called 'gold'"),
        ("{when: true, set: {depth: {max: 1}}}\n  - {when: gpu.throttled, set: {depth: {max: 2}}}", "7:12", "line 6 "),
        (
            "{when: batch.size > 8, set: {depth: {max: 1}}}\n  - {when: batch.size > 16, set: {depth: {max: 0}}}",
            "7:12",
            "unreachable",
        ),
        (
            "{when: kv.usage > 0.5, set: {schedule: {kind: throughput, causality: global}}}",
            "6:74",
            "biases rejection sampling",
        ),
    ],
)
def test_a_rule_that_cannot_mean_what_it_says_is_refused(rules: str, place: str, words: str):
    head = HEAD.replace("accept: {method: rejection}", "depth: {max: 6}")
    with pytest.raises(PolicyError) as caught:
        parse_policy(head + f"tiers: {{fast: {{}}}}\nrules:\n  - {rules}\n", "p.yaml")
    assert words in caught.value.message
    assert f"{caught.value.line}:{caught.value.column}" == place


@pytest.mark.parametrize(
    "when", ["gpu.util <= 1", "kv.usage > 0", "kv.usage == 1", "batch.size > 4 && batch.size <= 5"]
)
def test_what_can_hold_is_let_be(when: str):
    policy = parse_policy(f"{HEAD}rules: [{{when: {when}, set: {{depth: {{max: 1}}}}}}]")
    assert [rule.when for rule in policy.rules] == [when]


def test_a_rule_about_requests_does_not_stand_before_a_schedule():
    wide = "rules:\n  - {when: 'request.output_len > 64 || batch.size > 4', set: {depth: {max: 1}}}\n"
    rules = book(wide + "  - {when: batch.size > 10, set: {schedule: {kind: fixed, depth: 2}}}\n")
    assert rules.batch(Snapshot({"batch.size": 11})).schedule == FixedSchedule(2)
    with pytest.raises(PolicyError, match="unreachable: the rule at line 5"):
        book(wide + "  - {when: batch.size > 10, set: {depth: {max: 0}}}\n")


def test_folded_and_quoted_conditions_point_at_the_place_too():
    text = HEAD + "rules:\n  - when: >-\n      kv.usage > 0.9 &&\n      batch.sise > 3\n    set: {depth: {max: 1}}\n"
    with pytest.raises(PolicyError, match="p:7:7: .*'batch.sise'"):
        parse_policy(text, "p")
    text = HEAD + 'rules:\n  - when: "request.tier == \\"x\\" && batch.sise > 3"\n    set: {depth: {max: 1}}\n'
    with pytest.raises(PolicyError, match="p:5:37: .*'batch.sise'"):
        parse_policy(text, "p")


@pytest.mark.parametrize("kind", ["throughput", "slo, tokens_per_second_per_user: 30"])
def test_a_search_that_looks_ahead_is_refused_unless_acceptance_is_by_match(kind: str):
    text = f"version: 1\nschedule: {{kind: {kind}, causality: global}}\n"
    for method in ("accept: {method: rejection}\n", ""):
        with pytest.raises(PolicyError, match="p:2:.*biases rejection sampling"):
            parse_policy(text + method, "p")
    parse_policy(text + "accept: {method: match}\n")
    for causality in ("early_stop", "lagged", "auto"):
        parse_policy(text.replace("global", causality))
