"""What one server of a drafting algorithm answers: greedily, sampled, and how many drafts of each round it accepted.

Only asks; `test_server_algorithms.py` judges.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from dspark_sgl.server import Server

from . import tiny_drafts, tiny_models
from .draft_reference import DraftReference
from .sampling import Sampling
from .three_tokens import Text
from .tiny_server import tiny_server

AT_ONCE, POOL = 250, 40960
DEPTHS, WRITTEN = (1, 3, tiny_drafts.GAMMA), 64
TEXT = 90
"""Tokens of a long text: thirty times three."""
ASKED = [7, *chain.from_iterable((other, 7) for other in range(tiny_models.VOCAB)), *(3, 7, 5, 7, 9, 7, 1, 7, 10)]
"""Whatever token comes next, it has followed a 7 before, and often a 7 comes after it: a drafter that looks back finds
something, and is sometimes right. Two tokens more than whole pages of 4 and 16, so that samples share all the rest."""
REFERENCED = 40
"""Tokens that requests write whose rounds are recomputed."""

METHODS = {
    "rejection": "schedule: {kind: fixed, depth: 4}\naccept: {method: rejection}\n",
    "match": "schedule: {kind: fixed, depth: 4}\naccept: {method: match}\n",
    # How deep depends on the confidence of what was drafted: the case that a careless scheduler gets wrong. Calibrated,
    # that of random weights would soon be below any threshold.
    "by confidence": "schedule: {kind: threshold, confidence: 0.25}\naccept: {method: rejection}\n"
    "calibration: {method: none}\n",
    "tree": "schedule: {kind: fixed, depth: 4}\nshape: {kind: tree, max_nodes: 14, branch: 4}\n",
    "pruned tree": "schedule: {kind: threshold, confidence: 0.1}\nshape: {kind: tree, max_nodes: 14, branch: 4}\n"
    "calibration: {method: none}\n",
    "tree by match": "schedule: {kind: fixed, nodes: 7}\nshape: {kind: tree, max_nodes: 14}\naccept: {method: match}\n",
}
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
"""SGLang's own: every seventh forward gives up a request's KV, and the request comes back later."""


@dataclass(frozen=True)
class Algorithm:
    """methods: how its drafts are accepted; greedily, the first of them is tried, and trees
    write: makes its draft checkpoint in a folder; reference: recomputes what that drafts
    page: KV slots of a page; retracts: requests are retracted all the while, whatever room there is
    pool: KV slots; fewer than its requests come to need, where it is small: SGLang then gives up some in earnest
    """

    name: str
    methods: tuple[str, ...]
    write: Callable[[Path], None] | None = None
    reference: type[DraftReference] | None = None
    page: int = 1
    retracts: bool = False
    pool: int = POOL

    @property
    def greedy(self) -> list[str]:
        return list(dict.fromkeys((self.methods[0], *(m for m in self.methods if m == "tree"))))


@dataclass(frozen=True)
class Case:
    """So many long texts, sampled under a way of accepting, show a temperature that is `off` by this factor."""

    method: str
    sampling: Sampling
    texts: int
    off: float


@dataclass(frozen=True)
class Drafts:
    """How many were verified and how many of them accepted."""

    verified: int
    accepted: int

    @classmethod
    def of(cls, server: Server) -> Drafts:
        """Since the server's start."""
        counts = server.report()["counts"]
        return cls(counts.get("drafted", 0), counts.get("emitted", 0) - counts.get("request_rounds", 0))

    def __sub__(self, before: Drafts) -> Drafts:
        return Drafts(self.verified - before.verified, self.accepted - before.accepted)


@dataclass(frozen=True)
class Greedy:
    """texts: of every example, first with an empty radix cache, then with one that holds the prompts"""

    texts: list[list[list[int]]]
    cached: list[int]
    rounds: list[int]
    retracted: int
    drafts: Drafts


@dataclass(frozen=True)
class Sampled:
    texts: list[list[int]]
    retracted: int
    drafts: Drafts


@dataclass(frozen=True)
class Answered:
    """A request whose drafts can be recomputed. histogram: rounds by how many drafts were accepted"""

    prompt: list[int]
    written: list[int]
    histogram: list[int]
    cached: int


@dataclass(frozen=True)
class Trial:
    """greedy: by method and depth; to_the_end: what a prompt writes that may fill the context; first_three: of 50,000
    texts, how often; rounds: of requests never retracted; full: how often the KV pool was full
    """

    greedy: dict[tuple[str, int], Greedy]
    to_the_end: list[int]
    sampled: dict[Case, Sampled]
    first_three: Counter[Text]
    rounds: list[Answered]
    full: int


def run_trial(
    algorithm: Algorithm, cases: Sequence[Case], first_three: int, prompts: Sequence[list[int]], folder: Path
) -> Trial:
    """first_three: so many texts of three tokens, under the first method"""
    policy = folder / "policy.yaml"
    policy.write_text(policy_text(algorithm.methods[0]))
    more = [
        *("--chunked-prefill-size", "128", "--page-size", str(algorithm.page)),
        *("--max-total-tokens", str(algorithm.pool), "--max-running-requests", str(AT_ONCE)),
        # SGLang then lets in more than there is room for: it expects requests to write little of what they may.
        *("--schedule-conservativeness", "0.1"),
    ]
    draft = None if algorithm.write is None else algorithm.name
    environment = RETRACT if algorithm.retracts else None
    with tiny_server(folder, *more, algorithm=algorithm.name, draft=draft, environment=environment) as server:
        greedy: dict[tuple[str, int], Greedy] = {}
        for method in algorithm.greedy:
            server.edit_policy(policy, policy_text(method))
            greedy |= {(method, depth): run_greedy(server, prompts, depth) for depth in DEPTHS}
        server.edit_policy(policy, policy_text(algorithm.methods[0]))
        to_the_end = ask(server, prompts[0], tiny_models.CONTEXT - len(prompts[0]), temperature=0)["output_ids"]
        counts = run_first_three(server, first_three)
        sampled: dict[Case, Sampled] = {}
        for case in cases:
            server.edit_policy(policy, policy_text(case.method))
            sampled[case] = run_sampling(server, case)
        rounds = []
        if algorithm.reference is not None:
            server.edit_policy(policy, policy_text("match"))
            rounds = run_rounds(server)
        full = server.log.count("KV cache pool is full")
    return Trial(greedy, to_the_end, sampled, counts, rounds, full)


def policy_text(method: str) -> str:
    return f"version: 1\n{METHODS[method]}"


def no_deeper_than(depth: int) -> dict[str, Any]:
    return {"custom_params": {"dspark": {"max_depth": depth}}}


def ask(server: Server, prompt: list[int], count: int, **sampling: Any) -> Any:
    params = {"max_new_tokens": count, "ignore_eos": True, **sampling}
    return server.post("/generate", {"input_ids": prompt, "sampling_params": params})


def run_greedy(server: Server, prompts: Sequence[list[int]], depth: int) -> Greedy:
    def one(prompt: list[int]) -> dict[str, Any]:
        return dict(ask(server, prompt, WRITTEN, temperature=0, **no_deeper_than(depth)))

    before = Drafts.of(server)
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        fresh, again = list(pool.map(one, prompts)), list(pool.map(one, prompts))
    return Greedy(
        texts=[[answer["output_ids"] for answer in answers] for answers in (fresh, again)],
        cached=[answer["meta_info"]["cached_tokens"] for answer in again],
        rounds=[answer["meta_info"]["spec_verify_ct"] for answer in again],
        retracted=retractions([*fresh, *again]),
        drafts=Drafts.of(server) - before,
    )


def run_first_three(server: Server, texts: int) -> Counter[Text]:
    """Every other request drafts one token only: its third token is then the one after the last accepted draft."""

    def one(index: int) -> list[Text]:
        answers = ask(server, ASKED, 3, n=AT_ONCE, temperature=1.0, **no_deeper_than(1 + index % 2))
        return [tuple(answer["output_ids"]) for answer in answers]

    with ThreadPoolExecutor(2) as pool:
        return Counter(text for texts in pool.map(one, range(texts // AT_ONCE)) for text in texts)


def run_sampling(server: Server, case: Case) -> Sampled:
    """Long texts, two halves at a time, of which one drafts no deeper than 2: batches are ragged."""
    half = AT_ONCE // 2

    def one(index: int) -> list[dict[str, Any]]:
        depth = tiny_drafts.GAMMA if index % 2 else 2
        return list(ask(server, ASKED, TEXT, n=half, **case.sampling.asked(), **no_deeper_than(depth)))

    before = Drafts.of(server)
    with ThreadPoolExecutor(2) as pool:
        answers = [answer for answers in pool.map(one, range(case.texts // half)) for answer in answers]
    texts = [answer["output_ids"] for answer in answers]
    return Sampled(texts, retractions(answers), Drafts.of(server) - before)


def run_rounds(server: Server) -> list[Answered]:
    """Prompts short, longer than a chunk, and continuing another, for the radix cache to find; each twice."""
    draw = random.Random(0)
    fresh = [[draw.randrange(1, tiny_models.VOCAB) for _ in range(n)] for n in (2, 5, 16, 17, 60, 150)]
    prompts = [*fresh, *([*prompt, draw.randrange(1, tiny_models.VOCAB)] for prompt in fresh)] * 2
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, REFERENCED, temperature=1.0), prompts))
    return [
        Answered(prompt, answer["output_ids"], meta["spec_correct_drafts_histogram"], meta["cached_tokens"])
        for prompt, answer in zip(prompts, answers, strict=True)
        # Who comes back gets a token from prefill in the middle of its text.
        if (meta := answer["meta_info"])["num_retractions"] == 0
    ]


def retractions(answers: Sequence[dict[str, Any]]) -> int:
    return sum(answer["meta_info"]["num_retractions"] for answer in answers)
