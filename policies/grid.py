"""How deep a policy goes over a grid of loads: the real rules and the real scheduler, on a stated reference machine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .batch import Batch
from .cost import CostModel
from .expected_round import ExpectedRounds
from .explain import Load
from .language import Policy
from .reference import REFERENCE_SIDE, reference_survival
from .rules import RuleBook
from .scheduler import make_scheduler
from .shape import most_nodes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1000, 8000, 64000)
SETTLING = 16
"""Rounds in which `shape: auto` comes to follow what the schedule buys."""


@dataclass(frozen=True)
class GridPoint:
    """`depth`: verified draft tokens per request, mean over the batch; 0: plain. `line`: of the rule that fires."""

    batch_size: int
    context: int
    depth: float
    line: int | None


def depth_grid(policy: Policy, load: Load, block: int, cost: CostModel) -> Iterator[GridPoint]:
    """The depth at every load of the grid; `load` says what the grid does not. Context: tokens per request."""
    for context in CONTEXTS:
        for size in BATCH_SIZES:
            here = {"batch.size": float(size), "context.mean": float(context), "context.max": float(context)}
            here["request.context_len"] = float(context)
            yield depth_at(policy, replace(load, values={**load.values, **here}), block, cost)


def depth_at(policy: Policy, load: Load, block: int, cost: CostModel) -> GridPoint:
    """The first round at one load of a scheduler that has seen nothing; with `shape: auto`, the one it settles at."""
    book, snapshot = RuleBook(policy, block), load.snapshot
    active = book.batch(snapshot)
    limits = book.request(active, snapshot, load.request(str(load["request.tier"])))
    size, context = int(load["batch.size"] or 1), int(load["context.mean"] or 0)
    batch = Batch(
        min_depth=np.full(size, limits.min_depth),
        max_depth=np.full(size, limits.max_depth),
        weight=np.full(size, limits.weight),
        context=size * context,
        signals=snapshot.values,
    )
    scheduler = make_scheduler(active.schedule, cost, policy.cost.margin, "early_stop")
    rounds = ExpectedRounds(reference_survival(size, block), REFERENCE_SIDE, block, most_nodes(policy))
    verified = 0.0
    for _ in range(SETTLING if active.shape.kind == "auto" else 1):
        planned = rounds.plan(scheduler, batch, active.shape, np.arange(size))
        verified = 0.0 if planned.plain else float(planned.select(scheduler, batch).sum() / size)
        if verified == 0:
            break
        rounds.learn(verified)
    line = None if active.rule is None else policy.rules[active.rule].line
    return GridPoint(size, context, verified, line)
