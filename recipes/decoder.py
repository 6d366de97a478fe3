"""A small batched Llama decoder with fixed slots: the fast path of data generation on a CPU.

Why not `generate()`: its growing caches and repeated KV heads cost more than the model. Here the KV cache is allocated
once, grouped queries are a reshape, and a slot whose sequence ended is refilled at once. It samples from the model as
given and does nothing else: no beams, no penalties, no top-k.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.llama import FrozenLlama


class Sequence(Protocol):
    """What the decoder needs to know of a job."""

    ids: list[int]
    temperature: float
    limit: int


class SlotDecoder:
    """`slots` sequences of at most `length` tokens at once; a layer's KV is [slots, kv_heads, length, head_dim]."""

    def __init__(self, model: FrozenLlama, slots: int, length: int) -> None:
        self.model, self.slots, self.device = model, slots, model.device
        shape = (slots, model.kv_heads, length, model.head_dim)
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.layers]
        self.values = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.layers]
        self.jobs: list[Sequence | None] = [None] * slots
        self.written: list[list[int]] = [[] for _ in range(slots)]
        self.length = torch.zeros(slots, dtype=torch.long, device=model.device)  # tokens in the cache
        self.last = torch.zeros(slots, dtype=torch.long, device=model.device)  # next input token
        self.temperature = torch.ones(slots, device=model.device)

    @classmethod
    def from_pretrained(cls, path: str, slots: int, length: int, device: str) -> SlotDecoder:
        return cls(FrozenLlama.from_pretrained(path, length, device), slots, length)

    def free_slots(self) -> list[int]:
        return [i for i, job in enumerate(self.jobs) if job is None]

    def _forward(self, ids: Tensor, rows: Tensor | None, start: Tensor) -> Tensor:
        """ids [n, t] continue the slots `rows` (None: all, in order) at positions `start`; returns [n, t, hidden]."""
        n, t = ids.shape
        kv_heads, groups = self.model.kv_heads, self.model.heads // self.model.kv_heads
        pos = start[:, None] + torch.arange(t, device=self.device)
        end = int(pos.max()) + 1
        visible = torch.arange(end, device=self.device) <= pos[..., None]  # [n, t, end]
        mask = visible[:, None].repeat(1, 1, groups, 1)
        slots = torch.arange(n, device=self.device) if rows is None else rows
        index = (slots[:, None], slice(None), pos)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[i][index], self.values[i][index] = k, v
            keys, values = self.keys[i][:, :, :end], self.values[i][:, :, :end]
            if rows is not None:
                keys, values = keys[rows], values[rows]
            # The query heads of one KV head become extra query rows: no copy of the cache is made.
            q = q.view(n, t, kv_heads, groups, -1).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, groups * t, -1)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return out.view(n, kv_heads, groups, t, -1).permute(0, 3, 1, 2, 4).reshape(n, t, -1)

        return self.model.run(ids, pos, attend)[0]

    @torch.no_grad()
    def admit(self, jobs: list[Sequence]) -> None:
        """Fill free slots: all but the last prompt token go into the cache, in groups of similar length."""
        free = self.free_slots()[: len(jobs)]
        order = sorted(zip(free, jobs, strict=True), key=lambda pair: len(pair[1].ids))
        size = 16 if self.device.type == "cpu" else 256
        for first in range(0, len(order), size):
            group = order[first : first + size]
            rows = torch.tensor([slot for slot, _ in group], device=self.device)
            ids = torch.zeros(len(group), max(len(j.ids) for _, j in group) - 1, dtype=torch.long)
            for i, (slot, job) in enumerate(group):
                ids[i, : len(job.ids) - 1] = torch.tensor(job.ids[:-1])
                self.jobs[slot], self.written[slot] = job, []
                self.length[slot], self.last[slot] = len(job.ids) - 1, job.ids[-1]
                self.temperature[slot] = job.temperature
            # Padding lands behind the prompt, where decoding overwrites it before anything can attend to it.
            self._forward(ids.to(self.device), rows, torch.zeros_like(rows))

    @torch.no_grad()
    def step(self, eos: int) -> list[tuple[Sequence, list[int]]]:
        """One token for every slot; returns the jobs that ended with what they wrote (EOS included)."""
        hidden = self._forward(self.last[:, None], None, self.length)[:, 0]
        tokens = sample(F.linear(hidden, self.model.head), self.temperature)
        busy = torch.tensor([job is not None for job in self.jobs], device=self.device)
        self.length += busy
        self.last = torch.where(busy, tokens, self.last)
        done = []
        for slot, token in enumerate(tokens.tolist()):
            job = self.jobs[slot]
            if job is None:
                continue
            self.written[slot].append(token)
            if token == eos or len(self.written[slot]) >= job.limit:
                done.append((job, self.written[slot]))
                self.jobs[slot] = None
                self.length[slot] = 0
        return done


def sample(logits: Tensor, temperature: Tensor) -> Tensor:
    """Exact draws from softmax(logits / T) by inversion, int64 [n]; argmax where T = 0. Float32 throughout.

    logits [n, V]; temperature [n].

    Two levels, a block of 256 columns and then a column in it: a running sum over the whole row costs more than the
    rest of the draw together.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    greedy = temperature == 0
    tokens[greedy] = logits[greedy].argmax(-1)
    scaled = logits[~greedy].float() / temperature[~greedy, None]
    vocabulary = logits.shape[1]
    weights = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_()
    weights = F.pad(weights, (0, -vocabulary % 256)).unflatten(-1, (-1, 256))
    block = draw(weights.sum(-1))
    column = draw(weights[torch.arange(len(block), device=block.device), block])
    tokens[~greedy] = (block * 256 + column).clamp(max=vocabulary - 1)
    return tokens


def draw(weights: Tensor) -> Tensor:
    """Index [n] drawn in proportion to the non-negative weights [n, m]."""
    cumulative = weights.cumsum(-1)
    u = torch.rand(len(weights), 1, device=weights.device) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u, right=True).clamp(max=weights.shape[-1] - 1)
    return index[:, 0]
