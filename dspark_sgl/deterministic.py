"""`--enable-deterministic-inference` on a plain CPU: an answer that depends on its request and on nothing else.

SGLang ties each draw to a seed and a position. What is left is rounding, and there a row's company decides in which
order its sums are added. Where it does not (`kernels/linear.py`, `cpu_attention_plan.py`), a verify row has the very
logits of a plain step, and the target's own draw at every row is the one it would make there. So a chain accepted by
match gives plain decoding's tokens at any temperature, and their log-probabilities to the bit. The keys of a tree's
branch lie apart, and its sums have another order: no trees are drafted. Draws with SGLang's own functions.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.runtime_context import get_exec
from torch import Tensor

from dspark_sgl.kernels.filters import Filters
from dspark_sgl.kernels.linear import PACKED

from .cpu_ops import CpuHeadMethod, CpuLinearMethod


def deterministic() -> bool:
    """Whether the server was started with `--enable-deterministic-inference`."""
    return bool(get_exec().deterministic.enable_deterministic_inference)


def draws_as_plain_steps_do(model: torch.nn.Module) -> bool:
    """Whether a round of this loaded target can draw what plain steps would. With `--rl-on-policy-target` SGLang draws
    from other numbers."""
    return deterministic() and get_exec().deterministic.rl_on_policy_target is None and exact_rows(model)


def exact_rows(model: torch.nn.Module) -> bool:
    """Whether a row's products in this loaded target are the same to the bit whatever rows come with it."""
    layers = [module for module in model.modules() if getattr(module, "quant_method", None) is not None]
    ours = CpuLinearMethod | CpuHeadMethod
    return all(isinstance(layer.quant_method, ours) and hasattr(layer.weight, PACKED) for layer in layers)


def seeded_draw(logits: Tensor, filters: Filters, seeds: Tensor, positions: Tensor) -> Tensor:
    """int64 `[rows]`: what SGLang's sampler draws from these rows in a plain step.

    logits: `[rows, V]`, constrained; filters: one entry per row; seeds: int64 `[rows]`, of each row's request
    positions: int64 `[rows]`, of each row's token
    """
    probs = torch.softmax(logits.div(filters.temperature[:, None]), dim=-1)
    if not filters.active:
        return sampling_from_probs_torch(probs, seeds, positions).long()
    chosen: Tensor = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, filters.top_k, filters.top_p, filters.min_p, False, seeds, positions
    )
    return chosen.long()
