"""Packed copies of a model's weights: they follow the weights, and are not made where memory is short."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import sglang  # noqa: F401  before any module of its platforms, which import one another
import torch

from dspark_sgl.cpu_ops import install
from dspark_sgl.kernels.linear import FORMS, linear

pytestmark = pytest.mark.skipif(torch.bfloat16 not in FORMS, reason="nothing is packed on this machine")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)

    def load_weights(self, weight: torch.Tensor) -> int:
        self.fc.weight.data.copy_(weight)
        return 1


def test_a_loaded_weight_is_packed_anew() -> None:
    model, x = Model().requires_grad_(False), torch.ones(2, 8, dtype=torch.bfloat16)
    install(model)
    for value in (1.0, 2.0, 3.0):
        assert model.load_weights(torch.full((4, 8), value)) == 1
        assert torch.equal(linear(x, model.fc.weight), torch.full((2, 4), 8 * value, dtype=torch.bfloat16))


def test_a_load_that_fails_half_way_is_packed_anew_too() -> None:
    model, x = Model().requires_grad_(False), torch.ones(2, 8, dtype=torch.bfloat16)
    install(model)
    model.load_weights(torch.ones(4, 8))
    linear(x, model.fc.weight)
    model.fc.weight.data.fill_(2)
    with pytest.raises(RuntimeError):
        model.load_weights(torch.ones(3, 3))
    assert torch.equal(linear(x, model.fc.weight), torch.full((2, 4), 16, dtype=torch.bfloat16))


def test_no_memory_is_one_line_and_the_weights_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    model, x = Model().requires_grad_(False), torch.ones(2, 8, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        install(model)
    assert len(caplog.records) == 1 and "serving without" in caplog.text
    model.load_weights(torch.ones(4, 8))
    linear(x, model.fc.weight)
    model.fc.weight.data.fill_(2)  # no copy: seen at once
    assert torch.equal(linear(x, model.fc.weight), torch.full((2, 4), 16, dtype=torch.bfloat16))
