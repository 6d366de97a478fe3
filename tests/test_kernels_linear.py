"""Few-row products against torch's own, and the same to the bit whatever rows come with a row."""

from __future__ import annotations

import pytest
import torch

from dspark_sgl.kernels.linear import keep_packed, linear, packs


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_linear_layer(rows: int, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(80, 96).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    got = linear(x, weight, bias)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=2e-2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got.double(), wanted + 1, atol=tolerance, rtol=2e-2)


def test_more_dimensions_than_two() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is of x86")
@pytest.mark.parametrize("rows", [1, 2, 6, 64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_copy_multiplies_as_the_weight_does(
    rows: int, dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_sgl.kernels.linear.PACKS", True)
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(80, 96).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    assert keep_packed(weight) is weight
    for _ in range(2):
        wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        got = linear(x, weight, bias)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), wanted, atol=5e-2, rtol=2e-2)
        weight.data.neg_()  # as loaders write: unseen, until it is said
        assert torch.equal(linear(x, weight, bias), got)
        keep_packed(weight)


def test_what_float16_cannot_hold_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark_sgl.kernels.linear.PACKS", True)
    weight = keep_packed(torch.full((4, 8), 1e5, dtype=torch.bfloat16))
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(linear(x, weight), torch.full((2, 4), 8e5, dtype=torch.bfloat16))


def test_float32_is_never_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark_sgl.kernels.linear.PACKS", True)
    assert not packs(torch.ones(4, 8))
    assert packs(torch.ones(4, 8, dtype=torch.bfloat16))
