"""Packed copies of a model's weights: they follow the weights, and are not made where memory is short."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import sglang  # noqa: F401  before any module of its platforms, which import one another
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_loader.loader import DefaultModelLoader

from dspark_sgl.cpu_ops import install
from dspark_sgl.kernels.linear import FORMS

pytestmark = pytest.mark.skipif(torch.bfloat16 not in FORMS, reason="nothing is packed on this machine")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def load_weights(self, weight: torch.Tensor) -> None:
        self.layer.weight.data.copy_(weight)

    def of_ones(self) -> torch.Tensor:
        return self.layer.quant_method.apply(self.layer, torch.ones(2, 8, dtype=torch.bfloat16))


def _eights(value: float) -> torch.Tensor:
    return torch.full((2, 4), 8 * value, dtype=torch.bfloat16)


def test_a_loaded_weight_is_packed_anew() -> None:
    """By SGLang's own loader, as at the end of an update of any kind."""
    model = Model()
    install(model)
    for value in (1.0, 2.0, 3.0):
        weight = torch.full((4, 8), value)
        DefaultModelLoader.load_weights_and_postprocess(model, weight, torch.device("cpu"))
        assert torch.equal(model.of_ones(), _eights(value))
    model.load_weights(torch.ones(4, 8))
    assert torch.equal(model.of_ones(), _eights(3.0)), "it multiplies by a copy"


def test_no_memory_is_one_line_and_the_weights_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    model = Model()
    with caplog.at_level(logging.WARNING):
        install(model)
    assert len(caplog.records) == 1 and "serving without" in caplog.text
    model.load_weights(torch.ones(4, 8))
    assert torch.equal(model.of_ones(), _eights(1.0))
    model.load_weights(torch.full((4, 8), 2))  # no copy: seen at once
    assert torch.equal(model.of_ones(), _eights(2.0))
