"""What a request samples from, by the definition: written out plainly in float64, sharing nothing with the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, arange, float64, zeros

from . import tiny_models


@dataclass(frozen=True)
class Sampling:
    """Parameters of a request; bias: added to the logits of these tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = tiny_models.VOCAB
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def __str__(self) -> str:
        filters = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        active = [f"{name}={value}" for name, value in filters.items() if value != getattr(Sampling, name)]
        return ",".join([f"T={self.temperature}", *active, *(["bias"] if self.bias else [])])

    def off(self, factor: float) -> Sampling:
        return replace(self, temperature=self.temperature * factor)

    def asked(self) -> dict[str, Any]:
        """As a request of SGLang says it."""
        filters = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return filters | {"logit_bias": {str(token): value for token, value in self.bias}} if self.bias else filters

    def probabilities(self, logits: Tensor) -> Tensor:
        """float64, of the shape of `logits` `[..., V]`: softmax((logits + bias) / T), then of its tokens in descending
        order those below rank top_k, before which no more than top_p stands, and of min_p of the likeliest."""
        bias = zeros(logits.shape[-1], dtype=float64)
        for token, value in self.bias:
            bias[token] = value
        ordered, order = ((logits.double() + bias) / self.temperature).softmax(-1).sort(dim=-1, descending=True)
        kept = (arange(logits.shape[-1]) < self.top_k) & (ordered.cumsum(-1) - ordered <= self.top_p)
        ordered = ordered.where(kept & (ordered >= self.min_p * ordered[..., :1]), 0)
        return ordered.new_zeros(ordered.shape).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
