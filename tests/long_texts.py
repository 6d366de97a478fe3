"""Whether long texts were drawn from a target: chi-square tests over their tokens, three by three.

A token's place in its exact conditional distribution - the probability of all likelier tokens, and a random share of
its own - is uniform and independent of the places before it, if and only if each token is drawn from that distribution
(Rosenblatt, Remarks on a multivariate transformation, 1952). So the places of every three tokens in turn are uniform
in the unit cube whatever the text before them, and a text of ninety tokens is thirty samples of three for the price of
one request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import chi2, chisquare
from torch import Tensor
from transformers import LlamaForCausalLM

CELLS = 4
"""Along each side of the cube."""
EDGE = 1
"""Token that may be impossible: where a filter's threshold and a sum differ by rounding alone, once in millions."""


@torch.no_grad()
def logits(model: LlamaForCausalLM, prompt: Sequence[int], texts: Tensor) -> Tensor:
    """float32 `[n, k, V]`: what the target says before each token of int64 `texts` `[n, k]` after `prompt`."""
    whole = torch.cat([torch.tensor([*prompt]).expand(len(texts), -1), texts], dim=1)
    return torch.cat([model(part).logits[:, len(prompt) - 1 : -1] for part in whole.split(250)])


def p_value(p: Tensor, texts: Tensor) -> float:
    """0 where tokens are impossible, else twice the smaller of two p-values (Bonferroni).

    p: float64 `[n, 3 * k, V]`, what each token of int64 `texts` `[n, 3 * k]` should have been drawn from
    """
    own = p.gather(-1, texts[..., None])[..., 0]
    if (own == 0).sum() > EDGE:
        return 0.0
    return min(1.0, 2 * min(of_threes(p, own, texts), of_successors(p, own, texts)))


def of_threes(p: Tensor, own: Tensor, texts: Tensor) -> float:
    """Likely tokens first: sees a distribution that is too flat or too peaked."""
    order = p.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1).gather(-1, texts[..., None])
    places = cell_of(p.gather(-1, order).cumsum(-1).gather(-1, rank)[..., 0], own, CELLS)
    cells = places.view(-1, 3) @ torch.tensor([CELLS * CELLS, CELLS, 1])
    return float(chisquare(cells.bincount(minlength=CELLS**3)).pvalue)


def of_successors(p: Tensor, own: Tensor, texts: Tensor) -> float:
    """In the order of their ids, after each token anew: sees a token that comes too often, as a biased draft's does."""
    size = p.shape[-1]
    places = cell_of(p.cumsum(-1).gather(-1, texts[..., None])[..., 0], own, size)
    after = (texts[:, :-1] * size + places[:, 1:]).flatten().bincount(minlength=size * size).view(size, size)
    after = after[after.sum(-1) >= 5 * size]
    excess = chisquare(after, axis=-1).statistic.sum()
    return float(chi2.sf(excess, len(after) * (size - 1)))


def cell_of(cumulative: Tensor, own: Tensor, cells: int) -> Tensor:
    """int64: which of so many equal parts of [0, 1] a token falls in.

    cumulative: its own probability and that of the tokens before it in some order
    """
    share = torch.rand(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((cumulative - share * own) * cells).long().clamp(0, cells - 1)
