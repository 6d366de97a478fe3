"""The CPU platform's rotary embedding against SGLang's own, to the bit."""

from __future__ import annotations

import pytest
import sglang  # noqa: F401  before any module of its platforms, which import one another
import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.rotary_embedding import MRotaryEmbedding, RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding

from dspark_sgl import cpu_rope

POSITIONS = 300


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
@pytest.mark.parametrize("rotated", [16, 12], ids=["whole heads", "in part"])
def test_the_same_bits(rows: int, dtype: torch.dtype, neox: bool, rotated: int) -> None:
    torch.manual_seed(rows)
    rope = RotaryEmbedding(16, rotated, POSITIONS, 10_000, neox, dtype)
    q, k, _ = torch.randn(rows, 7 * 16, dtype=dtype).split((4 * 16, 2 * 16, 16), -1)
    positions = torch.randint(POSITIONS, (rows,))
    got, wanted = cpu_rope.rotate(rope, positions, q, k), rope.forward_native(positions, q, k)
    assert all(
        torch.equal(mine, theirs) and mine.shape == theirs.shape for mine, theirs in zip(got, wanted, strict=True)
    )


def test_a_table_that_has_grown_and_no_rows() -> None:
    rope = RotaryEmbedding(16, 16, 8, 10_000, True, torch.float32)
    q, k, far = torch.randn(1, 32), torch.randn(1, 16), torch.tensor([7])
    cpu_rope.rotate(rope, far, q, k)
    rope._ensure_cos_sin_cache_length(20)
    got = cpu_rope.rotate(rope, far + 12, q, k)
    assert torch.equal(got[0], rope.forward_native(far + 12, q, k)[0])
    assert cpu_rope.rotate(rope, far[:0], q[:0], k[:0])[1].shape == (0, 16)


def test_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that only have another table do; those with arithmetic of their own do not."""
    monkeypatch.setattr(BaseFusedOp, "_oot_forward_registry", {})
    cpu_rope.register("here")
    taken = BaseFusedOp._oot_forward_registry["here"]
    assert {RotaryEmbedding, Llama3RotaryEmbedding} <= taken.keys() and MRotaryEmbedding not in taken
