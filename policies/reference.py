"""A server that does not exist, for explaining a policy without one: costs and acceptance are stated, not measured.

The machine is an 8B model in bfloat16 on one large GPU, by the roofline: a step takes 1 ms besides the greater of
reading 16 GB of weights at 2.7 TB/s and multiplying its rows at 600 TFLOP/s, and 48 ns per KV token of the batch. A
draft pass takes 1 ms, a tenth of the target's price for each of its 7 rows a request, and a tenth of its price for the
context. A prefill takes 4 ms and 30 us a token. Requests differ in their drafts: the chance that a draft token follows
its predecessor into the output runs evenly from 0.6 to 0.95 over the batch; a lone request has 0.8. In a tree, a
further child is right one time in five where those before it are not.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .cost import CostModel, CostPoint

MACHINE = "reference: an 8B model on one large GPU"
DESCRIPTION = f"{MACHINE}, drafts accepted with 0.6 to 0.95 per position"

PREFILL_S, PREFILL_TOKEN_S = 4e-3, 3e-5

REFERENCE_SIDE = 0.2

_FIXED_S = 1e-3
_WEIGHTS_S = 16e9 / 2.7e12
_ROW_S = 16e9 / 600e12
_CONTEXT_S = 48e-9
_DRAFT_ROWS = 7
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_WIDTHS = (1, 2, 4, 8)


def reference_cost() -> CostModel:
    """The step times of the reference machine."""
    return CostModel.from_points(list(_points()))


def reference_survival(requests: int, depth: int) -> NDArray[np.float64]:
    """[requests, depth]: the chance that each position and all before it are accepted."""
    follow = np.linspace(0.6, 0.95, requests) if requests > 1 else np.array([0.8])
    return follow[:, None] ** np.arange(1, depth + 1)


def _points() -> Iterator[CostPoint]:
    for requests in _SIZES:
        for context in (0, 200_000, 2_000_000):
            yield CostPoint("plain", requests, requests, context, _step(requests, context))
            draft = _FIXED_S + requests * _DRAFT_ROWS * _ROW_S / 10 + context * _CONTEXT_S / 10
            yield CostPoint("draft", requests, requests * _DRAFT_ROWS, context, draft)
            for width in _WIDTHS:
                yield CostPoint("verify", requests, requests * width, context, _step(requests * width, context))


def _step(rows: int, context: int) -> float:
    return _FIXED_S + max(_WEIGHTS_S, rows * _ROW_S) + context * _CONTEXT_S
