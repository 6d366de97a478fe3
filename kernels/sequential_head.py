"""DSpark's sequential stage: left-to-right sampling of a block whose base logits are all known already.

    p_k(v | x_<k) = softmax(U_k + B_k)(v),   x_0 = the anchor

`U_k` come from one parallel backbone pass; `B_k` is a low-rank bias that depends on the token drawn just before, so a
step costs one `[bs, r] x [r, Vq]` product. Three heads (`W1`: V x r rows, `W2`: Vq x r rows, `w = W1[x_{k-1}]`):

    vanilla   B_k = W2 w
    gated     B_k = W2 (sigmoid(G [h_k; w]) * w)
    rnn       (g, c, o) = J [s_{k-1}; w; h_k],  s_k = sigmoid(g) s_{k-1} + (1 - sigmoid(g)) tanh(c),  B_k = W2 tanh(o)

Never runs the backbone and never decides how much of the block is verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draft_chain import ChainDraw, DraftChain
from .linear import linear


@dataclass(frozen=True)
class Linear:
    """weight `[out, in]`, bias `[out]` or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class SequentialHead:
    """The Markov head's weights, its output rows restricted to the columns that are drafted over.

    w1: `[V, r]`; w2: `[Vq, r]`; gate: `[H + r] -> [r]` for a gated head; joint: `[2r + H] -> [3r]` for an rnn head
    """

    w1: Tensor
    w2: Tensor
    gate: Linear | None = None
    joint: Linear | None = None

    def initial_state(self, batch_size: int) -> Tensor | None:
        """`[bs, r]` zeros for the rnn head, None for the memoryless ones."""
        return None if self.joint is None else self.w1.new_zeros(batch_size, self.w1.shape[1])

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """B_k `[n, Vq]` and the next state, after the tokens `previous` int64 `[n]` at features `hidden` `[n, H]`."""
        latent, state = self.latent(previous, hidden, state)
        return linear(latent, self.w2), state

    def latent(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What W2 is multiplied by, `[n, r]`, and the next state."""
        latent = self.w1[previous]
        if self.joint is not None:
            assert state is not None
            gate, candidate, output = self.joint(torch.cat([state, latent, hidden], -1)).chunk(3, -1)
            keep = torch.sigmoid(gate)
            state = keep * state + (1 - keep) * torch.tanh(candidate)
            latent = torch.tanh(output)
        elif self.gate is not None:
            latent = torch.sigmoid(self.gate(torch.cat([hidden, latent], -1))) * latent
        return latent, state


def draft_chain(
    head: SequentialHead, base_logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw
) -> DraftChain:
    """Sample (or take the argmax of) a block, left to right.

    base_logits: `[bs, D, Vq]`; hidden: `[bs, D, H]`; anchors: int64 `[bs]`
    """
    if base_logits.is_cuda:
        from . import sequential_head_triton

        return sequential_head_triton.draft_chain(head, base_logits, hidden, anchors, draw)
    return draft_chain_torch(head, base_logits, hidden, anchors, draw)


def draft_chain_torch(
    head: SequentialHead, base_logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw
) -> DraftChain:
    """The reference."""
    previous, state = anchors, head.initial_state(anchors.shape[0])
    q = draw.room(*base_logits.shape)
    columns = []
    for k in range(base_logits.shape[1]):
        bias, state = head.step(previous, hidden[:, k], state)
        columns.append(draw.columns(base_logits[:, k] + bias, None if q is None else q[:, k]))
        previous = draw.tokens(columns[k])
    return draw.chain(torch.stack(columns, dim=1), q)


def confidence(head: SequentialHead, proj: Linear, hidden: Tensor, anchors: Tensor, tokens: Tensor) -> Tensor:
    """float32 `[bs, D]`: `c_k = sigmoid(w . [h_k ; W1[x_{k-1}]] + b)`, the chance that draft k survives if 1..k-1 did.

    A head trained without the Markov embedding is told apart by its width.
    """
    features = hidden
    if proj.weight.shape[1] > hidden.shape[-1]:
        previous = torch.cat([anchors[:, None], tokens[:, :-1]], dim=1)
        features = torch.cat([hidden, head.w1[previous].to(hidden.dtype)], dim=-1)
    return torch.sigmoid(proj(features.to(proj.weight.dtype)).squeeze(-1).float())
