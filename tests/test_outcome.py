"""Log-probabilities are asked for where each token was emitted, in a ragged batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_sgl.kernels.layout import chain_layout
from dspark_sgl.kernels.walk import NO_ROW, Acceptance
from dspark_sgl.outcome import attach_logprobs


def test_each_row_is_asked_for_the_token_that_came_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {}

    def record(batch: Any, output: Any, after: torch.Tensor, accept_index: torch.Tensor) -> None:
        said.update(after=after, index=accept_index)

    monkeypatch.setattr("dspark_sgl.outcome.compute_spec_logprobs", record)
    anchors = torch.tensor([1, 2, 3])
    layout = chain_layout(anchors, torch.arange(9).view(3, 3), [2, 0, 3])  # rows 0 to 2, 3, and 4 to 7
    path = torch.tensor([[0, 1, NO_ROW], [0, NO_ROW, NO_ROW], [0, 1, 2]])
    emitted = torch.tensor([[11, 12, 99], [21, 99, 99], [31, 32, 33]])
    accepted = Acceptance(path, torch.tensor([2, 1, 3]), torch.tensor([12, 21, 33]))
    attach_logprobs(SimpleNamespace(), SimpleNamespace(), layout, accepted, emitted)
    assert said["after"].tolist() == [11, 12, 0, 21, 31, 32, 33, 0]
    kept = path != NO_ROW
    assert said["after"][said["index"][kept]].tolist() == emitted[kept].tolist()
