"""What happens to the target's logits before a token is chosen: penalties, grammar, logit bias, no NaN where asked.

The order is SGLang's own. Each verify row gets what plain decoding would apply at that place of the text.
Never samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties
from sglang.srt.speculative.spec_utils import GrammarTree, generate_token_bitmask
from sglang.srt.utils.async_probe import sanitize_nan_logits
from torch import Tensor

from dspark_sgl.kernels.layout import ROOT, TreeLayout
from dspark_sgl.kernels.staging import pinned


def needs_one_row(request: Any) -> bool:
    """A request whose constraints follow its text and cannot be asked about drafts: it gets the anchor's row alone in
    every round, where SGLang applies them as it does for plain decoding."""
    return _has_moving_penalties(request.sampling_params) or not _goes_back(request.grammar)


def _has_moving_penalties(params: Any) -> bool:
    """A penalty that depends on the tokens emitted so far. Inside a tree every branch would need its own count."""
    return bool(
        params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0 or params.min_new_tokens
    )


def _goes_back(grammar: Any) -> bool:
    """Whether a grammar can be walked down one branch of a tree and then another. That of Outlines cannot."""
    inner = getattr(grammar, "grammar", grammar)  # with reasoning before it, SGLang wraps one
    return inner is None or type(inner).rollback is not BaseGrammarObject.rollback


def constrain(logits: Tensor, layout: TreeLayout, info: Any, grammar: GrammarRows | None) -> None:
    """Apply in place to `logits` `[rows, V]`; `info` is SGLang's `SamplingBatchInfo` of the batch."""
    if info.acc_additive_penalties is not None:
        logits.add_(info.acc_additive_penalties[layout.owner])
    if info.acc_scaling_penalties is not None:
        apply_scaling_penalties(logits, info.acc_scaling_penalties[layout.owner])
    if grammar is not None:
        grammar.apply(logits)
    if info.logit_bias is not None:
        logits.add_(info.logit_bias[layout.owner])
    sanitize_nan_logits(logits, "verify: next_token_logits")


class GrammarRows:
    """The tokens a grammar allows after every row of the tree."""

    def __init__(self, bitmask: Tensor, grammar: Any) -> None:
        self._bitmask = bitmask
        self._grammar = grammar

    @classmethod
    def build(cls, layout: TreeLayout, rows: Tensor, batch: Any) -> GrammarRows | None:
        """Walk each request's grammar down its tree; None when no request has one.

        rows: int64 `[2, bs, W]`, the layout's tokens and parents, on the host
        """
        tokens, parents = rows
        tree = GrammarTree.from_host(*tree_links(parents, layout.widths), tokens)
        bitmask, grammar = generate_token_bitmask(batch.reqs, *tree.resolve(), batch.sampling_info.vocab_size)
        if bitmask is None or grammar is None:
            return None
        device = layout.tokens.device
        masks = pinned(bitmask.view(layout.batch_size, layout.max_width, -1), device).to(device, non_blocking=True)
        return cls(layout.pack(masks).contiguous(), grammar)

    def apply(self, logits: Tensor) -> None:
        self._grammar.apply_vocab_mask(logits=logits, vocab_mask=self._bitmask)


def tree_links(parents: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """int64 `[bs, W]` twice, on the host: first child and next sibling of every row, -1 for none.

    parents, widths: as in `TreeLayout`, on the host
    """
    child = torch.full_like(parents, -1)
    sibling = torch.full_like(parents, -1)
    for request, row_parents in enumerate(parents.tolist()):
        # From the last row up, so that a later sibling is known when an earlier one is linked.
        for row in range(widths[request] - 1, 0, -1):
            parent = row_parents[row]
            if parent != ROOT:
                sibling[request, row] = child[request, parent]
                child[request, parent] = row
    return child, sibling
