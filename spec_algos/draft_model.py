"""What every drafter with a model needs around it: its runner, the head its features go through, the trees it grows.

SGLang's own classes hold the weights. Never runs a forward.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.models.dspark import gather_and_crop_vocab, project_through_lm_head
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.speculative.draft_worker_common import build_draft_tp_worker
from sglang.srt.speculative.spec_utils import draft_pp_context
from torch import Tensor

from dspark_sgl.kernels.linear import keep_packed, linear
from dspark_sgl.kernels.tree_children import TreeDraw
from dspark_sgl.kernels.tree_draft import Children, TreeShape, grow_tree

from .protocol import DrafterContext, Proposal

logger = logging.getLogger(__name__)

HOT_VOCAB = "hot_vocab.json"


def load_draft(context: DrafterContext, algorithm: str) -> Any:
    """SGLang's worker around the draft checkpoint; its `model_runner` has the model and the KV pool."""
    target = context.target_worker.model_runner
    # SGLang builds a confidence head only for a ragged verification of its own, which this names; nothing else of a
    # model that is being built asks for it.
    with draft_pp_context(), envs.SGLANG_RAGGED_VERIFY_MODE.override(_ragged_mode()):
        bundle = build_draft_tp_worker(
            server_args=context.server_args,
            gpu_id=context.gpu_id,
            nccl_port=context.nccl_port,
            target_model_config=target.model_config,
            algo_label=algorithm,
            random_seed=context.target_worker.random_seed,
        )
    # SGLang asks an EAGLE-family worker for all its runners: to update weights, to back up the draft's KV.
    bundle.draft_worker.draft_runners = [bundle.draft_model_runner]
    return bundle.draft_worker


def _ragged_mode() -> str:
    config = json.loads((Path(get_spec().speculative_draft_model_path) / "config.json").read_bytes())
    return "static" if config.get("enable_confidence_head") is False else "cap-accept"


class DraftHead:
    """A vocabulary head and the token ids of its columns.

    lm_head: SGLang's module, whose padding, sharding and quantisation stay its own business
    hot: int64 `[Vq]`, the rows of `lm_head` to use, cut out once; None for all. Not for a sharded head
    vocab: int64 `[Vq]`, the token id of each column; None when a column is its token
    """

    def __init__(self, lm_head: Any, *, hot: Tensor | None = None, vocab: Tensor | None = None) -> None:
        self._lm_head, self._hot = lm_head, hot
        self.vocab = vocab if hot is None else hot
        self._rows = None if hot is None else keep_packed(lm_head.weight[hot].contiguous())

    def refresh(self) -> None:
        """Cut the hot rows out of `lm_head` as it now is, into the memory that a recording may read them from."""
        if self._rows is not None:
            keep_packed(self._rows.copy_(self._lm_head.weight[self._hot]))

    @property
    def columns(self) -> int:
        """`Vq`."""
        return int(self._lm_head.org_vocab_size) if self._rows is None else self._rows.shape[0]

    def logits(self, features: Tensor) -> Tensor:
        """`[n, Vq]` of `features` `[n, H]`."""
        if self._rows is not None:
            return linear(features.to(self._rows.dtype), self._rows)
        return gather_and_crop_vocab(project_through_lm_head(features, self._lm_head), self._lm_head)


def grown(
    children: Children,
    anchors: Tensor,
    depths: Tensor,
    shape: TreeShape,
    temperature: Tensor | None,
    greedy: Tensor,
    generator: torch.Generator,
) -> Proposal:
    """A tree per request. anchors, depths: int64 `[bs]`; temperature, greedy, generator: as in `Round`"""
    draw = None if temperature is None else TreeDraw(temperature, greedy, generator)
    tree = grow_tree(children, anchors, depths, shape, draw)
    return Proposal(tree.tokens, tree.parents, confidence=tree.chance, drawn=tree.drawn)


def hot_vocabulary(draft: Path, device: torch.device) -> Tensor | None:
    """int64 `[Vq]`, the tokens this draft was trained to propose, or None for all of them.

    The head is most of a small draft's cost, and a draft never needs the rare rows: what q leaves out, rejection
    sampling draws from the target.
    """
    file = draft / HOT_VOCAB
    if not file.is_file():
        return None
    if get_parallel().tp_size > 1:
        logger.info("%s: drafting over the whole vocabulary, since the lm_head is sharded", draft)
        return None
    return torch.tensor(json.loads(file.read_text()), dtype=torch.int64, device=device)
