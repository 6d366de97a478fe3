"""A draft over part of the vocabulary reads its own copy of the target's head, which new weights must reach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from dspark_sgl.spec_algos.draft_model import DraftHead


def test_new_weights_are_read_from_the_same_memory() -> None:
    weight, hot = torch.randn(12, 8), torch.tensor([1, 2, 5, 9])
    head = DraftHead(SimpleNamespace(weight=weight), hot=hot)
    features = torch.randn(3, 8)
    before, rows = head.logits(features), head._rows
    torch.testing.assert_close(before, features @ weight[hot].T)
    weight.copy_(torch.randn(12, 8))
    torch.testing.assert_close(head.logits(features), before)
    head.refresh()
    torch.testing.assert_close(head.logits(features), features @ weight[hot].T)
    assert head._rows is rows, "a recording reads from there"
