"""Which requests get one row a round: those whose constraints cannot be asked about drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.constrained.outlines_backend import OutlinesGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from dspark_sgl.constraints import needs_one_row

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
