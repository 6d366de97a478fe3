"""Few-row products against torch's own, and the same to the bit whatever rows come with a row."""

from __future__ import annotations

import pytest
import torch

from dspark_sgl.kernels.linear import linear


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
