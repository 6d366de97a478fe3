"""The statistic of `long_texts.py` tells exact acceptance from a biased one, on texts of a Markov chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from . import tiny_models
from .long_texts import p_value
from .sampling import Sampling

TEXTS, WRITTEN = 500, 60
SETTINGS = (Sampling(), Sampling(0.7, top_p=0.9), Sampling(0.7, top_k=6, min_p=0.05, bias=((3, 1.0), (7, -1.0))))
Token = Callable[[Tensor, Tensor], Tensor]
"""One of each row's p, which it should come from, drafted from q: float64 `[n, V]`, int64 `[n, 1]`."""


def rejection(residual: Token) -> Token:
    """A draft is kept with min(1, p / q); else a token of the residual."""

    def token(p: Tensor, q: Tensor) -> Tensor:
        draft = torch.multinomial(q, 1)
        kept = torch.rand(len(p), 1, dtype=p.dtype) < p.gather(1, draft) / q.gather(1, draft)
        return torch.where(kept, draft, torch.multinomial(residual(p, q) + 1e-30, 1))

    return token


exactly = rejection(lambda p, q: (p - q).clamp(min=0))
# The mistake that is easiest to make: the target's own distribution after a rejection.
biased = rejection(lambda p, q: p)


def write(sampling: Sampling, token: Token) -> tuple[Tensor, Tensor]:
    """Texts `[n, k]` and the logits of each of their tokens, which the two before it decide."""
    torch.manual_seed(0)
    target, draft = torch.randn(2, tiny_models.VOCAB, tiny_models.VOCAB, tiny_models.VOCAB) * 1.5
    texts = torch.ones(TEXTS, 2, dtype=torch.int64)
    for _ in range(WRITTEN):
        a, b = texts[:, -2], texts[:, -1]
        new = token(sampling.probabilities(target[a, b]), sampling.probabilities(draft[a, b]))
        texts = torch.cat([texts, new], dim=1)
    return texts[:, 2:], target[texts[:, :-2], texts[:, 1:-1]]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("token", [lambda p, q: torch.multinomial(p, 1), exactly], ids=["drawn", "accepted"])
def test_exact_texts_pass(sampling: Sampling, token: Token) -> None:
    texts, logits = write(sampling, token)
    assert p_value(sampling.probabilities(logits), texts) > 1e-3
    for factor in (1 / 1.12, 1.12):
        assert p_value(sampling.off(factor).probabilities(logits), texts) < 1e-6


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_biased_acceptance_does_not(sampling: Sampling) -> None:
    texts, logits = write(sampling, biased)
    assert p_value(sampling.probabilities(logits), texts) < 1e-12


def test_tokens_that_depend_on_one_another_do_not() -> None:
    """Each is uniform by itself, and every third is what the two before it say."""
    p = torch.full((2000, 3, 8), 1 / 8, dtype=torch.float64)
    texts = torch.randint(0, 8, (2000, 3), generator=torch.Generator().manual_seed(0))
    assert p_value(p, texts) > 1e-3
    texts[:, 2] = (texts[:, 0] + texts[:, 1]) % 8
    assert p_value(p, texts) < 1e-12


def test_what_cannot_be_drawn_is_certain_proof() -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).expand(1, 3, 3)
    assert p_value(p, torch.tensor([[0, 2, 2]])) == 0
