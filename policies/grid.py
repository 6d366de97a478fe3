"""How deep a policy goes over a grid of loads: the real rules and the real scheduler, on a stated reference machine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .cost import CostModel
from .explain import Load
from .language import Policy
from .reference import reference_survival
from .rules import RuleBook
from .scheduler import Batch, make_scheduler

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1000, 8000, 64000)


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
    """The depth of the first round at one load, from a scheduler that has seen nothing yet."""
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
    survival = reference_survival(size, block)
    drafted = scheduler.draft_depths(batch, survival)
    depth = 0.0
    if drafted.any():
        offered = np.where(np.arange(block) < drafted[:, None], survival, 0.0)
        depth = float(scheduler.select(batch, offered).sum() / size)
    line = None if active.rule is None else policy.rules[active.rule].line
    return GridPoint(size, context, depth, line)
