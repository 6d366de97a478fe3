"""Trees of drawn nodes: draws without replacement are what they say, and rejection down such a tree is exact.

Biased variants, which choose among drawn nodes by what was drawn, must fail the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark_sgl.kernels.layout import NO_NODE, TreeLayout, tree_layout
from dspark_sgl.kernels.tree_children import Picked, Scores, TreeDraw, draw_distinct, gains, pick
from dspark_sgl.kernels.tree_draft import DraftTree, IndependentChildren, TreeShape, grow_tree
from dspark_sgl.kernels.tree_rejection import children_table, reject_tree
from dspark_sgl.kernels.walk import Acceptance, walk
from dspark_sgl.policies.batch import Batch
from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import CostModel, CostPoint
from dspark_sgl.policies.forest import Forest
from dspark_sgl.policies.language import FixedSchedule, Schedule, ThresholdSchedule, ThroughputSchedule
from dspark_sgl.policies.scheduler import make_scheduler

from .test_kernels_accept import REJECT_BELOW, SAMPLES, VOCAB, distributions, p_value, table


@dataclass(frozen=True)
class TableChildren:
    """q `[V, Vq]` and c `[V]` by the token before: what is worth drawing depends on what was drawn above it."""

    q: Tensor
    sure: Tensor
    vocab: Tensor | None = None
    depth: int = 2
    beam: None = None

    def of(
        self, level: int, tokens: Tensor, state: Tensor | None, branch: int, draw: TreeDraw | None
    ) -> tuple[Picked, Tensor | None]:
        bs, count = tokens.shape
        owner = torch.arange(bs).repeat_interleave(count)
        flat, columns = tokens.flatten(), self.q.shape[1]
        scores = Scores(torch.zeros(bs, columns), owner, self.q[flat].log(), torch.eye(columns))
        return pick(scores, branch, draw, self.sure[flat]).view(bs, count), None


def confidences(seed: int = 5) -> Tensor:
    return torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed))


def drawn_tree(
    q: Tensor, anchors: Tensor, g: torch.Generator, vocab: Tensor | None = None, nodes: int = 6
) -> DraftTree:
    draw = TreeDraw(torch.ones(len(anchors)), torch.zeros(len(anchors), dtype=torch.bool), g)
    children = TableChildren(q, confidences(), vocab)
    return grow_tree(children, anchors, torch.full_like(anchors, 2), TreeShape(nodes, 3), draw)


def survival(tree: DraftTree) -> Tensor:
    whole = torch.ones(len(tree.tokens), tree.tokens.shape[1] + 1)
    for node in range(tree.tokens.shape[1]):
        up = tree.parents[:, node : node + 1]
        whole[:, node + 1] = tree.chance[:, node] * whole.gather(1, up.clamp(min=0))[:, 0]
    return whole[:, 1:]


def everything(tree: DraftTree, q: Tensor, anchors: Tensor) -> Tensor:
    return tree.parents != NO_NODE


def best_of_all(tree: DraftTree, q: Tensor, anchors: Tensor) -> Tensor:
    """Three nodes a request on average, the most promising of all requests together."""
    promise = survival(tree).flatten()
    kept = torch.zeros(len(promise), dtype=torch.bool)
    kept[promise.argsort(descending=True, stable=True)[: 3 * len(tree.tokens)]] = True
    return kept.view(tree.tokens.shape) & (tree.parents != NO_NODE)


def scheduled(tree: DraftTree, q: Tensor, anchors: Tensor, schedule: Schedule, least: int = 0) -> Tensor:
    """As a real scheduler decides, from calibrated promises."""
    forest = Forest.trees(tree.parents.numpy())
    promise = Calibration([1.5, 0.8]).apply(tree.chance.double().numpy(), forest)
    n = len(anchors)
    verify = [CostPoint("verify", n, rows, 0, 0.03 + 1e-6 * rows) for rows in (1, 10**6)]
    cost = CostModel.from_points([*verify, CostPoint("plain", 1, 1, 0, 0.03), CostPoint("draft", 1, 7, 0, 0.001)])
    batch = Batch(np.full(n, least), np.full(n, 2), np.ones(n), 0, {})
    return torch.from_numpy(make_scheduler(schedule, cost, 0.0, "early_stop").select(batch, promise, forest.depth))


def by_their_own_q(tree: DraftTree, q: Tensor, anchors: Tensor) -> Tensor:
    """Biased on purpose: drops a drawn node that turned out improbable."""
    every = torch.cat([anchors[:, None], tree.tokens], dim=1)
    before = every.gather(1, tree.parents.clamp(min=0))
    return closed(tree, q[before, tree.tokens] > 1 / VOCAB)


def by_what_hangs_from_them(tree: DraftTree, q: Tensor, anchors: Tensor) -> Tensor:
    """Biased on purpose: keeps a drawn node only where its own continuation looks good."""
    return closed(tree, confidences()[tree.tokens] > 0.5)


def closed(tree: DraftTree, wanted: Tensor) -> Tensor:
    kept = torch.cat([torch.ones_like(wanted[:, :1]), wanted & (tree.parents != NO_NODE)], dim=1)
    for node in range(wanted.shape[1]):
        kept[:, node + 1] &= kept.gather(1, tree.parents[:, node : node + 1].clamp(min=0))[:, 0]
    return kept[:, 1:]


Choice = Callable[[DraftTree, Tensor, Tensor], Tensor]


def tree_rejection(
    p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator, choose: Choice = everything, nodes: int = 6
) -> tuple[TreeLayout, Acceptance]:
    tree = drawn_tree(q, anchors, g, nodes=nodes)
    assert tree.drawn is not None
    layout = tree_layout(anchors, tree.tokens, tree.parents, choose(tree, q, anchors))
    return layout, reject_tree(layout, layout.pack(p[layout.tokens]), tree.drawn, g)


def likeliest_as_if_drawn(p: Tensor, q: Tensor, anchors: Tensor, g: torch.Generator) -> tuple[TreeLayout, Acceptance]:
    """Biased on purpose: the likeliest children, accepted as if they had been drawn."""
    tree = drawn_tree(q, anchors, g)
    assert tree.drawn is not None
    every = torch.cat([anchors[:, None], tree.tokens], dim=1)
    before = every.gather(1, tree.parents.clamp(min=0))
    place = (tree.parents[:, :, None] == tree.parents[:, None, :]).tril(-1).sum(2)
    best = q[before].argsort(dim=-1, descending=True).gather(2, place[..., None])[..., 0]
    layout = tree_layout(anchors, best, tree.parents, (tree.parents == 0))
    return layout, reject_tree(layout, layout.pack(p[layout.tokens]), tree.drawn, g)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize("choose", [everything, best_of_all])
def test_emitted_text_has_the_targets_distribution(choose: Choice, temperature: float, top_p: float) -> None:
    method = partial(tree_rejection, choose=choose)
    assert p_value(method, *distributions(temperature, top_p), seed=3) > REJECT_BELOW


@pytest.mark.parametrize("coldness", [0.03, 0.01, 0.003])
@pytest.mark.parametrize("choose", [everything, best_of_all])
def test_a_cold_draft_has_spent_its_mass_before_its_last_child(choose: Choice, coldness: float) -> None:
    """After a child or two q has nothing left that could be drawn; the children after them are not tried."""
    p, q = distributions(1.0, 1.0)
    method = partial(tree_rejection, choose=choose)
    assert p_value(method, p, torch.softmax(q.log() / coldness, -1), seed=3) > REJECT_BELOW


def test_a_cold_target_keeps_its_own_token() -> None:
    """p and q at temperature 0.05 over logits that lie 0.1 to 2 apart, in different orders: p says what comes."""
    g, columns, bs = torch.Generator().manual_seed(0), 1000, 4000
    draft, target = torch.zeros(columns), torch.zeros(columns)
    draft[[0, 1, 2, 700, 3]] = torch.tensor([9.0, 7.0, 6.6, 6.5, 5.0])
    target[[700, 9, 0]] = torch.tensor([9.0, 8.7, 8.5])
    p = torch.softmax(target / 0.05, -1)
    anchors = torch.zeros(bs, dtype=torch.int64)
    draw = TreeDraw(torch.full((bs,), 0.05), torch.zeros(bs, dtype=torch.bool), g)
    tree = grow_tree(IndependentChildren(draft.expand(bs, 1, -1), None), anchors, anchors + 1, TreeShape(4, 4), draw)
    assert tree.drawn is not None
    layout = tree_layout(anchors, tree.tokens, tree.parents, tree.parents != NO_NODE)
    accepted = reject_tree(layout, p.expand(len(layout.owner), -1), tree.drawn, g)
    shares = torch.bincount(accepted.emitted(layout)[:, 0], minlength=columns) / bs
    assert p[700] > 0.99 and torch.allclose(shares, p, atol=0.005)


@pytest.mark.parametrize(
    ("schedule", "least", "nodes"),
    [
        (ThresholdSchedule(0.3), 0, 6),
        (FixedSchedule(nodes=3), 0, 6),
        (ThroughputSchedule(), 0, 6),
        # Three nodes: whether one of them is at depth 2 depends on what was drawn for the others.
        (ThresholdSchedule(0.6), 2, 3),
    ],
    ids=["threshold", "nodes", "throughput", "a least depth"],
)
def test_what_a_scheduler_keeps_is_settled_before_it_is_drawn(schedule: Schedule, least: int, nodes: int) -> None:
    choose = partial(scheduled, schedule=schedule, least=least)
    assert p_value(partial(tree_rejection, choose=choose, nodes=nodes), *distributions(1.0, 1.0), seed=3) > REJECT_BELOW


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
@pytest.mark.parametrize(
    "method",
    [
        partial(tree_rejection, choose=by_their_own_q),
        partial(tree_rejection, choose=by_what_hangs_from_them),
        likeliest_as_if_drawn,
    ],
    ids=["pruned by their own q", "pruned by what hangs from them", "likeliest as if drawn"],
)
def test_a_biased_choice_is_caught(
    method: Callable[..., tuple[TreeLayout, Acceptance]], temperature: float, top_p: float
) -> None:
    assert p_value(method, *distributions(temperature, top_p), seed=3) < 1e-12


def test_more_draws_are_accepted_more_often_than_one() -> None:
    p, q = distributions(1.0, 1.0)
    g, anchors = torch.Generator().manual_seed(1), torch.zeros(20_000, dtype=torch.int64)

    def first_is_the_draws(tree: DraftTree, q: Tensor, anchors: Tensor) -> Tensor:
        first = (tree.parents[:, :, None] == tree.parents[:, None, :]).tril(-1).sum(2) == 0
        return closed(tree, first & (tree.parents == 0))

    _, one = tree_rejection(p, q, anchors, g, first_is_the_draws)
    _, three = tree_rejection(p, q, anchors, g)
    accepted = [(found.lengths > 1).double().mean() for found in (one, three)]
    assert accepted[0] == pytest.approx(float(torch.minimum(p[0], q[0]).sum()), abs=0.01)
    assert accepted[1] > accepted[0] + 0.05


def test_tokens_outside_the_drafts_vocabulary_can_be_drawn() -> None:
    """q over four of six tokens; what it leaves out comes from the residual."""
    g, hot = torch.Generator().manual_seed(0), torch.tensor([1, 4, 5, 0])
    p, q = table(4, 1.0), torch.softmax(torch.randn(VOCAB, 4, generator=g), -1)
    anchors = torch.zeros(SAMPLES, dtype=torch.int64)
    tree = drawn_tree(q, anchors, g, hot)
    assert tree.drawn is not None
    layout = tree_layout(anchors, tree.tokens, tree.parents, tree.parents != NO_NODE)
    accepted = reject_tree(layout, layout.pack(p[layout.tokens]), tree.drawn, g)
    counts = torch.bincount(accepted.emitted(layout)[:, 0], minlength=VOCAB)
    assert chisquare(counts.numpy(), (p[0].double() / p[0].double().sum() * SAMPLES).numpy()).pvalue > REJECT_BELOW


def test_a_greedy_request_among_sampled_ones_walks() -> None:
    """Its nodes are the likeliest, and they are accepted where they are the argmax; the others are not in its way."""
    g, bs = torch.Generator().manual_seed(2), 400
    q, anchors = table(2, 1.0), torch.arange(bs) % VOCAB
    greedy = torch.rand(bs, generator=g) < 0.4
    tree = grow_tree(
        TableChildren(q, confidences()),
        anchors,
        torch.full((bs,), 2),
        TreeShape(6, 3),
        TreeDraw(torch.ones(bs), greedy, g),
    )
    alone = grow_tree(TableChildren(q, confidences()), anchors[greedy], torch.full((bs,), 2)[greedy], TreeShape(6, 3))
    assert torch.equal(tree.tokens[greedy], alone.tokens) and torch.equal(tree.parents[greedy], alone.parents)
    assert tree.drawn is not None
    layout = tree_layout(anchors, tree.tokens, tree.parents, tree.parents != NO_NODE)
    target = table(1, 1.5)[layout.tokens].argmax(-1)
    certain = torch.nn.functional.one_hot(target, VOCAB).float()
    accepted = reject_tree(layout, layout.pack(certain), tree.drawn, g)
    wanted = walk(layout, target)
    assert torch.equal(accepted.path[greedy], wanted.path[greedy])
    assert torch.equal(accepted.bonus[greedy], wanted.bonus[greedy]) and (wanted.lengths[greedy] > 1).any()


def test_draws_without_replacement_come_in_the_order_and_with_the_chances_they_should() -> None:
    q = torch.tensor([0.5, 0.2, 0.0, 0.25, 0.05])
    found = draw_distinct(q.expand(SAMPLES, 5), 3, torch.Generator().manual_seed(0))
    some = [0, 1, 3, 4]
    triples = list(permutations(some, 3))
    chance = [q[a] * q[b] / (1 - q[a]) * q[c] / (1 - q[a] - q[b]) for a, b, c in triples]
    code = found[:, 0] * 25 + found[:, 1] * 5 + found[:, 2]
    counts = [int((code == a * 25 + b * 5 + c).sum()) for a, b, c in triples]
    assert sum(counts) == SAMPLES, "never a column of chance 0, never one twice"
    assert chisquare(counts, [float(x) * SAMPLES for x in chance]).pvalue > REJECT_BELOW


def test_no_draw_promises_more_than_the_one_before() -> None:
    promised = gains(torch.linspace(0, 1, 101), 6)
    assert (promised.diff(dim=1) <= 0).all() and (promised >= 0).all()


def test_children_are_listed_in_order() -> None:
    parents, anchors = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 0, NO_NODE, NO_NODE]]), torch.tensor([9, 9])
    layout = tree_layout(anchors, torch.arange(10).view(2, 5), parents, torch.ones(2, 5, dtype=torch.bool))
    assert children_table(layout).tolist() == [
        [[1, 2], [3, 4], [5, -1], [-1, -1], [-1, -1], [-1, -1]],
        [[1, 3], [2, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]],
    ]
