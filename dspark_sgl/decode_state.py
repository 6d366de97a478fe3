"""What a running batch carries from one round to the next: each request's anchor. Never holds drafts or KV."""

from __future__ import annotations

import torch
from sglang.srt.speculative.eagle_utils import eagle_prepare_for_decode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
from torch import Tensor


class DecodeState(SpecInput):
    """SGLang's `batch.spec_info` between rounds.

    anchors: int64 `[bs]`, the last token of each request; lens: int64 `[bs]`, tokens in its KV
    """

    def __init__(self, anchors: Tensor, lens: Tensor) -> None:
        super().__init__(SpecInputType.DFLASH_DRAFT)
        self.anchors = anchors.to(torch.int64)
        self.lens = lens
        # A waiting request counts as one token wherever SGLang multiplies requests by tokens.
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def prepare_for_decode(self, batch) -> None:
        """Reserve KV for the widest verify and accumulate penalties; SGLang's stateless preparation does both."""
        eagle_prepare_for_decode(batch)

    def filter_batch(self, new_indices: Tensor, new_indices_cpu: list[int] | None = None) -> None:
        """Keep the requests at `new_indices`."""
        self.anchors = self.anchors[new_indices]
        self.lens = self.lens[new_indices]

    def merge_batch(self, spec_info: DecodeState) -> None:
        """Append another batch's requests."""
        self.anchors = torch.cat([self.anchors, spec_info.anchors])
        self.lens = torch.cat([self.lens, spec_info.lens])
