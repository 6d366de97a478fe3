"""What a running batch carries from one round to the next: each request's anchor. Never holds drafts or KV."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.speculative.eagle_utils import eagle_prepare_for_decode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
from torch import Tensor


class DecodeState(SpecInput):
    """SGLang's `batch.spec_info` between rounds.

    bonus_tokens: int64 `[bs]`, the last token of each request, the anchor of its next round
    future_indices: int64 `[bs]`, where the scheduler overlaps with the device: the places where SGLang keeps the
        anchors until the round begins, when it reads them into `bonus_tokens`. None otherwise
    """

    # What SGLang also carries for drafters of its own.
    topk_p = topk_index = hidden_states = dsa_topk_indices = None
    future_dsa_topk_indices_available = False

    def __init__(self, anchors: Tensor) -> None:
        super().__init__(SpecInputType.DFLASH_DRAFT)
        self.bonus_tokens = anchors.to(torch.int64)
        self.future_indices: Tensor | None = None
        # A waiting request counts as one token wherever SGLang multiplies requests by tokens.
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def prepare_for_decode(self, batch: Any) -> None:
        """Reserve KV for the widest verify and accumulate penalties; SGLang's stateless preparation does both."""
        eagle_prepare_for_decode(batch)

    def filter_batch(self, new_indices: Tensor, new_indices_cpu: list[int] | None = None) -> None:
        """Keep the requests at `new_indices`."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
        else:
            self.bonus_tokens = self.bonus_tokens[new_indices]

    def merge_batch(self, spec_info: DecodeState) -> None:
        """Append another batch's requests."""
        if self.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, spec_info.future_indices])
        else:
            self.bonus_tokens = torch.cat([self.bonus_tokens, spec_info.bonus_tokens])
