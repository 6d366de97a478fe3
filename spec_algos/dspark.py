"""DSpark: the block backbone, then a light sequential head that tells each token which one it follows.

    x_k ~ q_k = softmax((U_k + B_k(x_<k)) / T),   c_k = sigmoid(w . [h_k ; W1[x_{k-1}]] + b)

U_k and h_k come from the backbone (`block.py`); the head's equations are in `kernels/sequential_head.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.speculative.dspark_components.dspark_config import parse_dspark_draft_config
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.linear import keep_packed
from dspark_sgl.kernels.sequential_head import Linear, SequentialHead, confidence, draft_chain
from dspark_sgl.kernels.tree_draft import MarkovChildren

from .block import BlockDrafter, BlockShape
from .protocol import DrafterContext, Proposal


class DSparkDrafter(BlockDrafter):
    """A chain drawn left to right, with the confidence that the draft was trained to state; or a tree, every branch of
    it conditioned on its own tokens."""

    algorithm: ClassVar[str] = "DSPARK_SGL"

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        self._markov = _sequential_head(self._model.markov_head, self._head.vocab)
        self._confidence = _linear(self._model.confidence_head.proj) if self._model.confidence_head else None

    def _block_shape(self, config: Any) -> BlockShape:
        parsed = parse_dspark_draft_config(draft_hf_config=config)
        # Some drafts leave the anchor's own row unused and predict from the mask rows alone: one row more.
        skip = 0 if self._model.sample_from_anchor else 1
        return BlockShape(int(parsed.resolve_gamma(default=None)) + skip, skip, int(parsed.mask_token_id))

    def _share(self, embed_tokens: Any, lm_head: Any) -> None:
        self._model.attach_shared_modules(embed_tokens=embed_tokens, lm_head=lm_head)

    def _draw(self, logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw) -> Proposal:
        chain = draft_chain(self._markov, logits, hidden, anchors, draw)
        scores = None
        if self._confidence is not None:
            scores = confidence(self._markov, self._confidence, hidden, anchors, chain.tokens)
        return Proposal.of_chain(chain, scores)

    def _children(self, logits: Tensor, hidden: Tensor) -> MarkovChildren:
        return MarkovChildren(self._markov, logits, hidden, self._head.vocab, self._confidence)


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)


def _sequential_head(markov: Any, vocab: Tensor | None) -> SequentialHead:
    """Our view of SGLang's Markov head modules; the attributes tell vanilla, gated and rnn apart."""
    w2 = markov.markov_w2.weight
    return SequentialHead(
        w1=markov.markov_w1.weight,
        w2=keep_packed(w2 if vocab is None else w2[vocab].contiguous()),
        gate=_linear(markov.gate_proj) if hasattr(markov, "gate_proj") else None,
        joint=_linear(markov.joint_proj) if hasattr(markov, "joint_proj") else None,
    )
