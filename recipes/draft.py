"""What every trainable draft is: a module that says, for many anchors at once, which tokens come next.

The trainer and the evaluation know only this. A draft never holds the target's embedding or head, and knows nothing of
data, losses or optimisers; its checkpoint is in the format that SGLang's model class for it reads.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.data import Record
from recipes.llama import FrozenLlama, rope_tables
from recipes.shape import Shape
from recipes.states import Reading

LONGEST = 2048
"""Positions for which rotary tables are kept while training."""


@dataclass(frozen=True)
class Blocks:
    """A draft's answer for `n * a` anchors, `steps` rows each, flat.

    hidden: `[n * a * steps, H]`, what the target's head reads
    latent: `[n * a * steps, r]`, multiplied with `Draft.w2` and added to the logits; r = 0 without a sequential head
    """

    hidden: Tensor
    latent: Tensor


class Draft(nn.Module, ABC):
    """Row k of an anchor at position a predicts the token at a + k, teacher-forced with the text's a + 1 .. a + k - 1.

    kind: the algorithm, as in `--speculative-algorithm DSPARK_SGL`, without the ending and in small letters
    architecture: what its `config.json` calls it
    hot: int64 `[v]`, sorted ids of the tokens it may propose; logits are over these only
    """

    kind: ClassVar[str]
    architecture: ClassVar[str]
    hot: Tensor

    def __init__(self, shape: Shape, steps: int, layer_ids: tuple[int, ...], hot: Tensor) -> None:
        super().__init__()
        self.shape, self.steps, self.layer_ids = shape, steps, layer_ids
        self.register_buffer("hot", hot)
        cos, sin = rope_tables(LONGEST, shape.head_dim, shape.theta, hot.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @abstractmethod
    def forward(self, reading: Reading, anchors: Tensor, embedding: Tensor) -> Blocks:
        """anchors: int64 `[n, a]`, ascending positions of tokens that have a successor; embedding: `[V, H]`"""

    @property
    def w2(self) -> Tensor:
        """`[v, r]`"""
        return torch.zeros(len(self.hot), 0, device=self.hot.device)

    def confidence_logit(self, blocks: Blocks) -> Tensor | None:
        """`[rows]`, or None where the draft's own probability of a token is its confidence."""
        return None

    @abstractmethod
    def initialise(self, target: FrozenLlama, records: list[Record]) -> None:
        """Start from what the target and its text already know."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""

    @abstractmethod
    def checkpoint(self, head: Tensor) -> dict[str, Tensor]:
        """Its tensors by the names SGLang reads. head: `[V, H]`, the target's."""

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, hf: dict[str, Any], tensors: dict[str, Tensor], hot: Tensor) -> Draft:
        """The inverse of `config` and `checkpoint`."""

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin `[..., 1, d]` for heads in the last dimension but one."""
        return self.cos[positions].to(dtype).unsqueeze(-2), self.sin[positions].to(dtype).unsqueeze(-2)

    def export(self, folder: Path, head: Tensor) -> None:
        """Write the checkpoint; each file appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        staged = {name: folder / f".{name}.part" for name in ("model.safetensors", "config.json", "hot_vocab.json")}
        tensors = {
            name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in self.checkpoint(head).items()
        }
        save_file(tensors, staged["model.safetensors"], metadata={"format": "pt"})
        staged["config.json"].write_text(json.dumps(self.config() | self.shape.hf(), indent=2) + "\n")
        staged["hot_vocab.json"].write_text(json.dumps(self.hot.tolist()) + "\n")
        for name, path in staged.items():
            path.replace(folder / name)


def copy_layer(source: Any, projections: Any, mlp: Any, shape: Shape, columns: slice = slice(None)) -> None:
    """A target layer's weights into a draft layer's; `columns` of q, k and v where the draft's input is wider."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), source.qkv.split([q, kv, kv]), strict=True):
        getattr(projections, name).weight[:, columns] = weight.to(torch.float32)
    projections.o_proj.weight.copy_(source.out)
    gate, up = source.gate_up.chunk(2)
    mlp.gate_proj.weight.copy_(gate)
    mlp.up_proj.weight.copy_(up)
    mlp.down_proj.weight.copy_(source.down)


def scaled_identity(fc: nn.Linear, scale: Tensor, hidden: int) -> None:
    """Start a projection of concatenated features as the last of them, plus a little of the rest."""
    fc.weight.mul_(0.3)
    last = slice(-hidden, None)
    fc.weight[:, last] += torch.diag(1 / scale[last]) / (1 / scale[last]).std()
