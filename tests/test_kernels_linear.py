"""Packed products against float64, and the same to the bit whatever rows come with a row."""

from __future__ import annotations

import pytest
import torch

from dspark_sgl.kernels.linear import FORMS, LARGEST, Blocked, Widened, keep_packed, linear, packs

HALF = (torch.bfloat16, torch.float16)
PACKED = [
    *FORMS.items(),
    *((dtype, Widened) for dtype in HALF if FORMS.get(dtype) is Blocked),  # as on a CPU that lacks them
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


def _name(form: tuple[torch.dtype, type | None]) -> str:
    return f"{form[0]} {getattr(form[1], '__name__', 'not packed')}"


@pytest.fixture(params=[*PACKED, (torch.float32, None), (torch.bfloat16, None)], ids=_name)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A type of weights; they are multiplied in one of the forms that a machine may have for it."""
    kind, form = request.param
    if form is None:
        monkeypatch.delitem(FORMS, kind, raising=False)
    else:
        monkeypatch.setitem(FORMS, kind, form)
    return kind


def _exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 33, 64, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_a_linear_layer(rows: int, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(80, 96).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    tolerance = TOLERANCE[dtype]
    assert keep_packed(weight) is weight
    for _ in range(2):
        got = linear(x, weight, bias)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), _exact(x, weight, bias), atol=tolerance, rtol=2e-2)
        if rows:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(got.double(), _exact(x, weight, bias) + 1, atol=tolerance, rtol=2e-2)
        weight.data.neg_()  # as loaders write: unseen by a copy, until it is said
        if packs(weight):
            assert torch.equal(linear(x, weight, bias), got)
        keep_packed(weight)


@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (33, 77), (2000, 64), (300, 1024), (256, 4096)])
@pytest.mark.parametrize("dtype", PACKED, ids=_name, indirect=True)
def test_company_does_not_change_a_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = keep_packed(torch.randn(shape).to(dtype))
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("not known of AMX")
    x = torch.randn(300, shape[1]).to(dtype)
    together = linear(x, weight)
    for rows in (*range(1, 20), 32, 33, 64, 100, 256):
        assert torch.equal(linear(x[:rows], weight), together[:rows]), rows
    for row in range(100):  # in bfloat16 few rows show another order of their sums
        assert torch.equal(linear(x[row : row + 1], weight), together[row : row + 1]), row


def test_more_dimensions_than_two(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 8).to(dtype), keep_packed(torch.randn(5, 8).to(dtype))
    got, tolerance = linear(x, weight), TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), _exact(x, weight, None), atol=tolerance, rtol=2e-2)
    torch.testing.assert_close(linear(x.transpose(0, 1), weight), got.transpose(0, 1))


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is of x86")
def test_what_float16_cannot_hold_is_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, torch.bfloat16, Widened)
    weight = keep_packed(torch.full((4, 8), 1e5, dtype=torch.bfloat16))
    assert weight.max() > LARGEST
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(linear(x, weight), torch.full((2, 4), 8e5, dtype=torch.bfloat16))


def test_only_what_a_cpu_multiplies_is_packed() -> None:
    assert not packs(torch.ones(4, 8, dtype=torch.float64))
    assert not packs(torch.ones(4, 8, 2))
    assert packs(torch.ones(4, 8)) == (torch.float32 in FORMS)
