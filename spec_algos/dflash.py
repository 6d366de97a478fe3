"""DFlash: the block backbone alone. Every position is drafted on its own, none knows what stands before it.

    x_k ~ q_k = softmax(U_k / T),   c_k = max_v softmax(U_k)(v)

Checkpoints come in two layouts. SGLang's (`DFlashDraftModel`): mask k predicts the token in its own place and the
anchor's row predicts nothing, so a block of n rows is n - 1 drafts. DeepSpec's, marked `sample_from_anchor`: DSpark's
block without its head, where the anchor's row predicts the first draft and n rows are n drafts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw, certainty, draw_at_once
from dspark_sgl.kernels.tree_draft import IndependentChildren

from .block import BlockDrafter, BlockShape
from .protocol import Proposal


class DFlashDrafter(BlockDrafter):
    """All positions in one go; how peaked a position is says how much it is worth."""

    algorithm: ClassVar[str] = "DFLASH_SGL"

    def _block_shape(self, config: Any) -> BlockShape:
        parsed = parse_dflash_draft_config(draft_hf_config=config)
        skip = 0 if getattr(config, "sample_from_anchor", False) else 1
        return BlockShape(int(parsed.resolve_block_size(default=None)), skip, int(parsed.mask_token_id))

    def _share(self, embed_tokens: Any, lm_head: Any) -> None:
        self._model.embed_tokens = embed_tokens

    def _draw(self, logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw) -> Proposal:
        chain = draw_at_once(logits, draw)
        return Proposal.of_chain(chain, certainty(logits))

    def _children(self, logits: Tensor, hidden: Tensor) -> IndependentChildren:
        return IndependentChildren(logits, self._head.vocab)
