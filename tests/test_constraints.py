"""Which requests get one row a round, since their constraints cannot be asked about drafts; and a target's NaN."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.constrained.outlines_backend import OutlinesGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.environ import envs

from dspark_sgl.constraints import constrain, needs_one_row
from dspark_sgl.kernels.layout import chain_layout

NOTHING = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}


def request(grammar: Any = None, **params: float) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(**NOTHING | params), grammar=grammar)


@pytest.mark.parametrize(("name", "value"), [*zip(NOTHING, (0.5, -0.5, 1.1, 3), strict=True)])
def test_penalties_that_move_with_the_text(name: str, value: float) -> None:
    assert needs_one_row(request(**{name: value})) and not needs_one_row(request())


@pytest.mark.parametrize(
    ("kind", "alone"), [(OutlinesGrammar, True), (XGrammarGrammar, False), (GuidanceGrammar, False)]
)
def test_grammars_that_cannot_go_back(kind: type, alone: bool) -> None:
    """By themselves, or behind reasoning."""
    grammar = object.__new__(kind)
    wrapper: Any = object.__new__(ReasonerGrammarObject)
    wrapper.grammar = grammar
    assert needs_one_row(request(grammar)) == needs_one_row(request(wrapper)) == alone
    wrapper.grammar = None  # nothing but reasoning
    assert not needs_one_row(request(wrapper))


def test_nan_of_the_target_is_what_sglang_makes_of_it() -> None:
    """Nothing, unless the server's environment asks for finite logits, as for plain decoding."""
    layout = chain_layout(torch.tensor([3]), torch.tensor([[1]]), [1])
    info = SimpleNamespace(acc_additive_penalties=None, acc_scaling_penalties=None, logit_bias=None)
    logits = torch.tensor([[0.0, math.nan, math.inf], [1.0, 2.0, -math.inf]])
    constrain(logits, layout, info, None)
    assert logits[0, 1].isnan() and logits[0, 2].isinf()
    with envs.SGLANG_SANITIZE_NAN_LOGITS.override(True):
        constrain(logits, layout, info, None)
    assert logits.tolist() == torch.tensor([[0.0, -1e30, 1e30], [1.0, 2.0, -1e30]]).tolist()
