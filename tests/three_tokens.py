"""The first three tokens that a tiny target writes: the probability of each text, and whether samples agree with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM

from . import tiny_models
from .sampling import Sampling

Text = tuple[int, int, int]


@torch.no_grad()
def exact(model: LlamaForCausalLM, prompt: Sequence[int], sampling: Sampling) -> dict[Text, float]:
    """p(a) p(b | a) p(c | a, b) of every text, from the target alone."""
    pairs = list(product(range(tiny_models.VOCAB), repeat=2))
    logits = model(torch.tensor([[*prompt, *pair] for pair in pairs])).logits[:, len(prompt) - 1 :]
    p = sampling.probabilities(logits)
    return {
        (a, b, c): float(p[i, 0, a] * p[i, 1, b] * p[i, 2, c])
        for i, (a, b) in enumerate(pairs)
        for c in range(tiny_models.VOCAB)
    }


def p_value(counts: Counter[Text], expected: dict[Text, float]) -> float:
    """Chi-square, cells that expect fewer than five samples pooled; a text the target cannot write is certain proof."""
    total = sum(counts.values())
    if any(expected[text] == 0 for text in counts):
        return 0.0
    common = [text for text, p in expected.items() if p * total >= 5]
    observed = [counts[text] for text in common]
    wanted = [expected[text] * total for text in common]
    if total - sum(wanted) > 1e-6 * total:
        observed, wanted = [*observed, total - sum(observed)], [*wanted, total - sum(wanted)]
    scale = total / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue)
