"""Every drafting algorithm is exact, by the same tests on a real server: ours, and one of another package.

A target of twelve tokens whose every distribution is known, in float32. Greedy: token for token what transformers
computes from the whole text each time, eight requests at once, prompts prefilled in chunks over a shared prefix.
Sampling: chi-square of the first three tokens over 50,000 samples for each way of accepting, or 10,000 where it is a
variation. The same statistic rejects a target that is off by five percent in temperature, or twelve,
so it has the power to see a bias. That drafts were offered and accepted is counted.

Each algorithm is tried once, on a server of its own, and the tests judge what the trial brought.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server

from . import tiny_drafts, tiny_models
from .three_tokens import Text, exact, p_value

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

PER_REQUEST = 250
DEPTHS, WRITTEN = (1, 3, tiny_models.GAMMA), 64
SETTINGS = ((1.0, 1.0), (0.7, 0.9))
"""Temperature and top-p."""
ASKED = [token for other in range(tiny_models.VOCAB) for token in (7, other)] + [7]
"""Whatever token comes next, it has followed a 7 before, and often a 7 comes after it: a drafter that looks back finds
something, and is sometimes right."""

METHODS = {
    "rejection": "schedule: {kind: fixed, depth: 4}\naccept: {method: rejection}\n",
    "match": "schedule: {kind: fixed, depth: 4}\naccept: {method: match}\n",
    # How deep depends on the confidence of what was drafted: the case that a careless scheduler gets wrong.
    "by confidence": "schedule: {kind: threshold, confidence: 0.25}\naccept: {method: rejection}\n",
    "tree": "schedule: {kind: fixed, depth: 4}\nshape: {kind: tree, max_nodes: 14, branch: 4}\n",
    "pruned tree": "schedule: {kind: threshold, confidence: 0.1}\nshape: {kind: tree, max_nodes: 14, branch: 4}\n",
    "tree by match": "schedule: {kind: fixed, nodes: 7}\nshape: {kind: tree, max_nodes: 14}\naccept: {method: match}\n",
}
ROOM = 16
"""Draft tokens that KV is reserved for: policies change under the running server, the room does not."""


@dataclass(frozen=True)
class Algorithm:
    """methods: how its drafts are accepted; all ways for the first, those that read its q for others that have one
    write: makes its draft checkpoint in a folder; page: KV slots of a page
    """

    name: str
    methods: tuple[str, ...]
    write: Callable[[Path], None] | None = None
    page: int = 1


ALGORITHMS = (
    Algorithm("DSPARK_SGL", tuple(METHODS), tiny_models.write_draft),
    Algorithm("DFLASH_SGL", ("rejection", "tree"), tiny_drafts.write_dflash, page=16),
    Algorithm("EAGLE3_SGL", ("rejection", "tree"), tiny_drafts.write_eagle3, page=4),
    Algorithm("MTP_SGL", ("rejection",), tiny_drafts.write_mtp),
    Algorithm("NGRAM_SGL", ("match",)),
    Algorithm("BRANCH_SGL", ("match",)),  # another package's, chains and trees
)


def settings(algorithm: Algorithm, method: str) -> tuple[tuple[float, float], ...]:
    """Both for rejection, whose q is each drafter's own. What filters do elsewhere, one algorithm shows."""
    first = algorithm is ALGORITHMS[0] and method in ("match", "tree")
    return SETTINGS if first or method == "rejection" else SETTINGS[:1]


@dataclass(frozen=True)
class Size:
    """samples: so many show a temperature that is `off` by this factor"""

    samples: int
    off: float


WHOLE, LESS = Size(50_000, 1.05), Size(10_000, 1.12)


def size(algorithm: Algorithm, method: str, setting: tuple[float, float]) -> Size:
    """Whole for each way of accepting, by one algorithm; filtered, what trees accept by is the chains' arithmetic."""
    whole = method in ("rejection", "match") or (method, setting) == ("tree", SETTINGS[0])
    return WHOLE if algorithm is ALGORITHMS[0] and whole else LESS


SAMPLINGS = [(a, method, setting) for a in ALGORITHMS for method in a.methods for setting in settings(a, method)]
GREEDY = [(a, method) for a in ALGORITHMS for method in (a.methods[0], "tree") if method in a.methods]


# -- Trials: what one server of an algorithm answered ------------------------------------------------------------------


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
    drafts: Drafts


@dataclass(frozen=True)
class Sampled:
    counts: Counter[Text]
    drafts: Drafts


@dataclass(frozen=True)
class Trial:
    """By method and depth, and by method and setting."""

    greedy: dict[tuple[str, int], Greedy]
    sampled: dict[tuple[str, tuple[float, float]], Sampled]


def run_trial(algorithm: Algorithm, prompts: Sequence[list[int]], folder: Path) -> Trial:
    policy = folder / f"{algorithm.name}.yaml"
    policy.write_text(policy_text(algorithm.methods[0]))
    draft = [] if algorithm.write is None else ["--speculative-draft-model-path", str(folder / algorithm.name)]
    arguments = [
        *("--model-path", str(folder / "target"), *draft, "--speculative-algorithm", algorithm.name),
        *("--speculative-num-steps", str(tiny_models.GAMMA), "--dspark-policy", str(policy)),
        *("--speculative-num-draft-tokens", str(ROOM)),
        *("--dtype", "float32", "--skip-tokenizer-init", "--skip-server-warmup", "--chunked-prefill-size", "64"),
        *("--page-size", str(algorithm.page), "--max-total-tokens", "16384"),
        *("--max-running-requests", str(PER_REQUEST)),
    ]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with Server(arguments, {"PYTHONPATH": paths}) as server:
        greedy: dict[tuple[str, int], Greedy] = {}
        sampled: dict[tuple[str, tuple[float, float]], Sampled] = {}
        for method in [method for a, method in GREEDY if a is algorithm]:
            server.edit_policy(policy, policy_text(method))
            greedy |= {(method, depth): run_greedy(server, prompts, depth) for depth in DEPTHS}
        for method in algorithm.methods:
            server.edit_policy(policy, policy_text(method))
            for setting in settings(algorithm, method):
                sampled[method, setting] = run_sampling(server, *setting, size(algorithm, method, setting).samples)
    return Trial(greedy, sampled)


def policy_text(method: str) -> str:
    return f"version: 1\n{METHODS[method]}"


def run_greedy(server: Server, prompts: Sequence[list[int]], depth: int) -> Greedy:
    limit = {"custom_params": {"dspark": {"max_depth": depth}}}
    sampling = {"temperature": 0, "max_new_tokens": WRITTEN, "ignore_eos": True, **limit}

    def ask(prompt: list[int]) -> dict:
        return server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})

    before = Drafts.of(server)
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        fresh, again = list(pool.map(ask, prompts)), list(pool.map(ask, prompts))
    return Greedy(
        texts=[[answer["output_ids"] for answer in answers] for answers in (fresh, again)],
        cached=[answer["meta_info"]["cached_tokens"] for answer in again],
        rounds=[answer["meta_info"]["spec_verify_ct"] for answer in again],
        drafts=Drafts.of(server) - before,
    )


def run_sampling(server: Server, temperature: float, top_p: float, samples: int) -> Sampled:
    """Every other request drafts one token only: its third token is then the one after the last accepted draft."""
    sampling = {"n": PER_REQUEST, "temperature": temperature, "top_p": top_p, "max_new_tokens": 3, "ignore_eos": True}

    def ask(index: int) -> list[Text]:
        limit = {"custom_params": {"dspark": {"max_depth": 1 + index % 2}}}
        answers = server.post("/generate", {"input_ids": ASKED, "sampling_params": sampling | limit})
        return [tuple(answer["output_ids"]) for answer in answers]

    before = Drafts.of(server)
    with ThreadPoolExecutor(2) as pool:
        counts = Counter(text for texts in pool.map(ask, range(samples // PER_REQUEST)) for text in texts)
    return Sampled(counts, Drafts.of(server) - before)


# -- Greedy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    wanted: list[int]


def choose_examples(model: LlamaForCausalLM) -> list[Example]:
    """Eight prompts, each more than one chunk, half of them with the same beginning, and their greedy texts; the
    first is the one of many whose text repeats itself most."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, tiny_models.VOCAB, (32, 100), generator=g)
    prompts[1:5, :70] = prompts[1, :70]
    texts = tiny_models.greedy(model, prompts, WRITTEN)
    news = [len(set(pairwise(text))) for text in texts.tolist()]
    chosen = [min(range(len(news)), key=news.__getitem__), *range(1, 8)]
    return [Example(prompts[i].tolist(), texts[i].tolist()) for i in chosen]


# -- All trials ---------------------------------------------------------------------------------


def write_all(folder: Path) -> None:
    """The target, every draft, and what looks like an installed package with a drafter."""
    tiny_models.write_target(folder / "target")
    for algorithm in ALGORITHMS:
        if algorithm.write is not None:
            algorithm.write(folder / algorithm.name)
    shutil.copy(Path(__file__).parent / "toy_drafter.py", folder)
    info = folder / "toy_drafter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-drafter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dspark_sgl.spec_algos]\nbranch = toy_drafter:BranchingDrafter\n")


@dataclass(frozen=True)
class Tried:
    """trial: an algorithm's, run when it is first asked for"""

    model: LlamaForCausalLM
    examples: list[Example]
    trial: Callable[[Algorithm], Trial]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    folder = tmp_path_factory.mktemp("tiny")
    write_all(folder)
    model = LlamaForCausalLM.from_pretrained(folder / "target").float().eval()
    examples = choose_examples(model)
    prompts = [example.prompt for example in examples]
    return Tried(model, examples, cache(lambda algorithm: run_trial(algorithm, prompts, folder)))


# -- What the trials brought -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "method"), GREEDY, ids=[f"{a.name}-{method}" for a, method in GREEDY])
@pytest.mark.parametrize("depth", DEPTHS)
def test_greedy_tokens_are_the_targets(
    algorithm: Algorithm,
    method: str,
    depth: int,
    tried: Tried,
) -> None:
    found = tried.trial(algorithm).greedy[method, depth]
    for texts in found.texts:
        assert texts == [example.wanted for example in tried.examples]
    assert min(found.cached) >= 64
    print(f"\n{algorithm.name}, {method}, depth {depth}: {found.drafts}")
    assert found.drafts.verified > found.drafts.accepted > 20


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.write is None], ids=lambda a: a.name)
def test_a_text_that_repeats_itself_is_drafted_well(algorithm: Algorithm, tried: Tried) -> None:
    """By those that look back; random weights see no repetition."""
    rounds = tried.trial(algorithm).greedy[algorithm.methods[0], tiny_models.GAMMA].rounds[0]
    assert (WRITTEN - 1) / rounds > 1.5


# -- Sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "method", "setting"), SAMPLINGS, ids=[f"{a.name}-{method}-{s[0]}" for a, method, s in SAMPLINGS]
)
def test_samples_are_the_targets(
    algorithm: Algorithm,
    method: str,
    setting: tuple[float, float],
    tried: Tried,
) -> None:
    found = tried.trial(algorithm).sampled[method, setting]
    (temperature, top_p), wanted = setting, size(algorithm, method, setting)
    print(f"\n{algorithm.name}, {method}, temperature {temperature}: {found.drafts}")
    assert sum(found.counts.values()) == wanted.samples
    assert p_value(found.counts, exact(tried.model, ASKED, temperature, top_p)) > 1e-4
    assert p_value(found.counts, exact(tried.model, ASKED, temperature * wanted.off, top_p)) < 1e-6
    assert found.drafts.verified > found.drafts.accepted > wanted.samples / 500
