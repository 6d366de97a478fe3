"""Every drafting algorithm is exact, by the same tests on a real server: ours, and one of another package.

A target of twelve tokens whose every distribution is known, in float32. Greedy: token for token what transformers
computes from the whole text each time, eight requests at once, prompts prefilled in chunks over a shared prefix.
Sampling: chi-square of the first three tokens over 50,000 samples, and of every three successive tokens of long texts
(see `long_texts.py`): 52,500 for each way of accepting, or 7,500 where it is a variation. The same statistic rejects a
target that is off by five percent in temperature, or twelve, so it has the power to see a bias. That drafts were
offered and accepted is counted; that they are the draft module's own is recomputed: wrong hidden states, a token off by
one or a stale row would leave the output exact and only be accepted less often. Two algorithms run under forced
retraction.

Each algorithm is tried once, on a server of its own, and the tests judge what the trial brought.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from . import long_texts, three_tokens, tiny_drafts, tiny_models
from .draft_reference import DFlashReference, DSparkReference, Eagle3Reference, MTPReference, expect_rounds_of
from .questions import once
from .sampling import Sampling
from .trials import (
    ASKED,
    AT_ONCE,
    DEPTHS,
    METHODS,
    POOL,
    TEXT,
    WRITTEN,
    Algorithm,
    Case,
    Trial,
    run_trial,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

FREE, FILTERED = Sampling(), Sampling(0.7, top_p=0.9)
SHAPED = Sampling(0.7, top_k=6, min_p=0.05, bias=((3, 1.0), (7, -1.0)))
FIRST_THREE = 50_000
WHOLE, LESS = (7 * AT_ONCE, 1.05), (AT_ONCE, 1.12)
"""Texts, and the factor of temperature that they show."""

ALGORITHMS = (
    Algorithm("DSPARK_SGL", tuple(METHODS), tiny_drafts.write_dspark, DSparkReference),
    Algorithm("DFLASH_SGL", ("rejection", "tree"), tiny_drafts.write_dflash, DFlashReference, page=16, retracts=True),
    Algorithm("EAGLE3_SGL", ("rejection", "tree"), tiny_drafts.write_eagle3, Eagle3Reference, page=4, retracts=True),
    Algorithm("MTP_SGL", ("rejection", "tree"), tiny_drafts.write_mtp, MTPReference),
    Algorithm("NGRAM_SGL", ("match",)),
    Algorithm("BRANCH_SGL", ("match",), pool=1100),  # another package's, chains and trees
)
FIRST = ALGORITHMS[0]


def cases(algorithm: Algorithm) -> list[Case]:
    """Of the first all, and those that read its q of others that have one. Free of filters, it accepts by rejection
    in `first_three` too."""
    if algorithm is not FIRST:
        found = [Case(method, FREE, *LESS) for method in algorithm.methods]
        return [*found, Case("rejection", FILTERED, *LESS)] if "rejection" in algorithm.methods else found
    return [
        *(Case("rejection", FREE, *LESS), Case("rejection", FILTERED, *WHOLE), Case("rejection", SHAPED, *LESS)),
        *(Case("match", FREE, *WHOLE), Case("match", FILTERED, *WHOLE)),
        *(Case("tree", FREE, *WHOLE), Case("tree", FILTERED, *LESS)),
        *(Case(method, FREE, *LESS) for method in ("by confidence", "pruned tree", "tree by match")),
        Case("pruned tree", FILTERED, *LESS),
    ]


SAMPLINGS = [(a, case) for a in ALGORITHMS for case in cases(a)]
GREEDY = [(a, method) for a in ALGORITHMS for method in a.greedy]


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    wanted: list[int]


def choose_examples(model: LlamaForCausalLM) -> list[Example]:
    """Eight prompts, each more than one chunk, half of them with the same beginning, and their greedy texts; the
    first is the one of many whose text repeats itself most."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, tiny_models.VOCAB, (32, 150), generator=g)
    prompts[1:5, :110] = prompts[1, :110]
    texts = tiny_models.greedy(model, prompts, WRITTEN)
    news = [len(set(pairwise(text))) for text in texts.tolist()]
    chosen = [min(range(len(news)), key=news.__getitem__), *range(1, 8)]
    return [Example(prompts[i].tolist(), texts[i].tolist()) for i in chosen]


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

    folder: Path
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

    @once
    def trial(algorithm: Algorithm) -> Trial:
        return run_trial(algorithm, cases(algorithm), FIRST_THREE if algorithm is FIRST else 0, prompts, folder)

    return Tried(folder, model, examples, trial)


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
    assert min(found.cached) >= 64 or algorithm.pool < POOL
    print(f"\n{algorithm.name}, {method}, depth {depth}: {found.drafts}, {found.retracted} retracted")
    assert found.drafts.verified > found.drafts.accepted > 10
    assert found.retracted > 5 or not algorithm.retracts


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_a_request_may_fill_the_context(algorithm: Algorithm, tried: Tried) -> None:
    """Nobody is refused for the room that drafts take, and the last rounds find theirs."""
    prompt, got = tried.examples[0].prompt, tried.trial(algorithm).to_the_end
    assert len(prompt) + len(got) >= tiny_models.CONTEXT - 3
    assert got == tiny_models.greedy(tried.model, torch.tensor([prompt]), len(got))[0].tolist()


def test_requests_that_do_not_fit_come_back(tried: Tried) -> None:
    """The tests of what they then wrote are the others."""
    assert {a.name for a in ALGORITHMS if tried.trial(a).full} == {"BRANCH_SGL"}


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.write is None], ids=lambda a: a.name)
def test_a_text_that_repeats_itself_is_drafted_well(algorithm: Algorithm, tried: Tried) -> None:
    """By those that look back; random weights see no repetition."""
    rounds = tried.trial(algorithm).greedy[algorithm.methods[0], tiny_drafts.GAMMA].rounds[0]
    assert (WRITTEN - 1) / rounds > 1.5


def test_the_first_three_tokens_are_the_targets(tried: Tried) -> None:
    counts = tried.trial(FIRST).first_three
    assert counts.total() == FIRST_THREE
    assert three_tokens.p_value(counts, three_tokens.exact(tried.model, ASKED, FREE)) > 1e-4
    assert three_tokens.p_value(counts, three_tokens.exact(tried.model, ASKED, FREE.off(1.05))) < 1e-6


@pytest.mark.parametrize(
    ("algorithm", "case"), SAMPLINGS, ids=[f"{a.name}-{case.method}-{case.sampling}" for a, case in SAMPLINGS]
)
def test_long_texts_are_the_targets(algorithm: Algorithm, case: Case, tried: Tried) -> None:
    found = tried.trial(algorithm).sampled[case]
    print(f"\n{algorithm.name}, {case.method}, {case.sampling}: {found.drafts}, {found.retracted} retracted")
    texts = torch.tensor(found.texts)
    assert texts.shape == (case.texts, TEXT)
    logits = long_texts.logits(tried.model, ASKED, texts)
    assert long_texts.p_value(case.sampling.probabilities(logits), texts) > 1e-4
    assert long_texts.p_value(case.sampling.off(case.off).probabilities(logits), texts) < 1e-6
    assert found.drafts.verified > found.drafts.accepted > texts.numel() / 500
    assert found.retracted > 5 or not algorithm.retracts


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.reference is not None], ids=lambda a: a.name)
def test_every_round_accepts_what_the_module_itself_says(algorithm: Algorithm, tried: Tried) -> None:
    assert algorithm.reference is not None
    answers = tried.trial(algorithm).rounds
    assert len(answers) == 24 if not algorithm.retracts else 6 < len(answers) < 24
    expect_rounds_of(algorithm.reference(tried.model, tried.folder / algorithm.name), answers)
