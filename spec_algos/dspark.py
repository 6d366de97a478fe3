"""DSpark: a parallel backbone over the target's hidden states, then a light sequential head.

SGLang's own model classes hold the weights (DeepSpec checkpoint format); everything that happens with them is here: the
context KV written from the target's hidden states, the block pass, the sequential and the confidence head. Never looks
at load or policy, and never verifies.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.models.dspark import gather_and_crop_vocab, project_through_lm_head
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import can_dflash_slice_qkv_weight
from sglang.srt.speculative.draft_worker_common import build_draft_tp_worker
from sglang.srt.speculative.dspark_components.dspark_config import parse_dspark_draft_config
from sglang.srt.speculative.spec_utils import draft_pp_context
from torch import Tensor

from dspark_sgl.kernels.linear import linear
from dspark_sgl.kernels.sequential_head import Linear, SequentialHead, confidence, draft_chain

from .protocol import Commit, Drafter, DrafterContext, Proposal, Round

logger = logging.getLogger(__name__)

HOT_VOCAB = "hot_vocab.json"


class DSparkDrafter(Drafter):
    """Anchor and mask tokens through the backbone, then a chain drawn left to right."""

    algorithm: ClassVar[str] = "DSPARK_SGL"
    uses_target_hidden: ClassVar[bool] = True

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        target = context.target_worker.model_runner
        with draft_pp_context():
            bundle = build_draft_tp_worker(
                server_args=context.server_args,
                gpu_id=context.gpu_id,
                nccl_port=context.nccl_port,
                target_model_config=target.model_config,
                algo_label=self.algorithm,
                random_seed=context.target_worker.random_seed,
            )
        self._worker = bundle.draft_worker
        self._runner = bundle.draft_model_runner
        self._model = bundle.draft_model
        config = parse_dspark_draft_config(draft_hf_config=self._runner.model_config.hf_config)
        self._gamma = int(config.resolve_gamma(default=None))
        self._mask_token = int(config.mask_token_id)
        self._block = min(self._gamma, context.block)
        # Some drafts leave the anchor's own row unused and predict from the mask rows alone.
        self._skip = 0 if self._model.sample_from_anchor else 1
        lm_head = unwrap_lora_layer(target.model.lm_head)
        self._model.attach_shared_modules(
            embed_tokens=unwrap_lora_layer(target.model.get_input_embeddings()), lm_head=lm_head
        )
        if torch.device(target.device).type == "cpu":
            for layer in self._model.layers:
                layer.self_attn.use_table_qk_norm_rope = False  # a Triton kernel; the model has a torch branch
        self._kv_weight = _stacked_kv_weight([layer.self_attn for layer in self._model.layers])
        self._vocab = self._hot_vocabulary(lm_head)
        self._hot_head = None if self._vocab is None else lm_head.weight[self._vocab].contiguous()
        self._head = _sequential_head(self._model.markov_head, self._vocab)
        self._confidence = _linear(self._model.confidence_head.proj) if self._model.confidence_head else None
        self._block_input = DFlashVerifyInput(
            draft_token=torch.empty(0, dtype=torch.int64, device=target.device),
            positions=torch.empty(0, dtype=torch.int64, device=target.device),
            draft_token_num=self._gamma + self._skip,
            custom_mask=None,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )

    @property
    def block(self) -> int:
        return self._block

    @property
    def draft_worker(self) -> Any:
        return self._worker

    def propose(self, round: Round) -> Proposal:
        depth = min(max(round.depths), self._block)
        hidden = self._backbone(round)[:, :depth]
        chain = draft_chain(
            self._head,
            self._base_logits(hidden),
            hidden,
            round.anchors,
            self._vocab,
            round.temperature,
            round.greedy,
            round.generator,
        )
        scores = None
        if self._confidence is not None:
            scores = confidence(self._head, self._confidence, hidden, round.anchors, chain.tokens)
        return Proposal(chain.tokens, None, chain.distribution, chain.token_probs, scores)

    def observe(self, commit: Commit) -> None:
        """Write the context KV: every draft layer's own keys and values of `H_ctx = hidden_norm(fc(hidden))`."""
        if commit.hidden is None:
            raise RuntimeError(f"{self.algorithm} needs the target's hidden states and the forward captured none")
        if commit.hidden.shape[0] == 0:
            return
        context = self._context(commit.hidden)
        pool = self._runner.token_to_kv_pool
        slots = KVWriteLoc(commit.cache_locs, physical=True)
        for layer, (keys, values) in zip(self._model.layers, self._keys_and_values(context), strict=True):
            attention = layer.self_attn
            keys = attention.apply_k_rope(commit.positions, attention.apply_k_norm(keys))
            shape = (-1, attention.num_kv_heads, attention.head_dim)
            radix = attention.attn
            pool.set_kv_buffer(radix, slots, keys.view(shape), values.view(shape), radix.k_scale, radix.v_scale)

    def _context(self, hidden: Tensor) -> Tensor:
        """`[n, H]`: `H_ctx = hidden_norm(fc(hidden))`."""
        if type(self._model.fc) is torch.nn.Linear:
            return self._model.hidden_norm(linear(hidden, self._model.fc.weight))
        return self._model.project_target_hidden(hidden)

    def _keys_and_values(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's `[n, kv]` keys and values, before norm and RoPE: one product for all layers where it can be."""
        if self._kv_weight is None:
            return [layer.self_attn.kv_proj_only(context) for layer in self._model.layers]
        both = linear(context, self._kv_weight).chunk(len(self._model.layers), -1)
        return [tuple(layer.chunk(2, -1)) for layer in both]

    def _backbone(self, round: Round) -> Tensor:
        """`[bs, gamma, H]`: features of the block `anchor, mask, ..., mask` at positions `lens .. lens + gamma - 1`."""
        bs, rows = round.anchors.shape[0], self._gamma + self._skip
        block = torch.full((bs, rows), self._mask_token, dtype=torch.int64, device=round.anchors.device)
        block[:, 0] = round.anchors
        positions = round.lens[:, None] + torch.arange(rows, device=round.lens.device)
        ends = round.lens_cpu + rows
        batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=bs,
            input_ids=block.flatten(),
            req_pool_indices=round.req_slots,
            seq_lens=round.lens,
            out_cache_loc=round.cache_locs[:, :rows].flatten(),
            seq_lens_sum=int(ends.sum()),
            seq_lens_cpu=ends,
            positions=positions.flatten(),
            spec_info=self._block_input,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        self._runner.kv_index_translator.bind_own_plan(batch)
        output = self._runner.forward(batch).logits_output
        assert isinstance(output, LogitsProcessorOutput) and output.hidden_states is not None
        return output.hidden_states.view(bs, rows, -1)[:, self._skip :]

    def _base_logits(self, hidden: Tensor) -> Tensor:
        """`[bs, D, Vq]`: `U_k = lm_head(h_k)`, through the target's head or its hot rows."""
        if self._hot_head is not None:
            flat = linear(hidden.flatten(0, 1).to(self._hot_head.dtype), self._hot_head)
            return flat.view(*hidden.shape[:2], -1)
        lm_head = self._model.lm_head
        flat = project_through_lm_head(hidden.flatten(0, 1), lm_head)
        return gather_and_crop_vocab(flat, lm_head).view(*hidden.shape[:2], -1)

    def _hot_vocabulary(self, lm_head: Any) -> Tensor | None:
        """int64 `[Vq]`, the tokens this draft was trained to propose, or None for all of them.

        The lm_head is most of a small draft's cost, and a draft never needs the rare rows: what q leaves out, rejection
        sampling draws from the target.
        """
        path = Path(self._runner.model_config.model_path) / HOT_VOCAB
        if not path.is_file():
            return None
        if get_parallel().tp_size > 1:
            logger.info("%s: drafting over the whole vocabulary, since the lm_head is sharded", self.algorithm)
            return None
        return torch.tensor(json.loads(path.read_text()), dtype=torch.int64, device=lm_head.weight.device)


def _stacked_kv_weight(attentions: list[Any]) -> Tensor | None:
    """`[layers * 2 kv, H]`, or None where a layer does more than multiply (quantised, biased, scaled values)."""
    rows = []
    for attention in attentions:
        projection = attention.qkv_proj
        plain, _ = can_dflash_slice_qkv_weight(projection)
        if not plain or projection.bias is not None or attention.v_scale is not None:
            return None
        rows.append(projection.weight[attention.q_size : attention.q_size + 2 * attention.kv_size])
    return torch.cat(rows)


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)


def _sequential_head(markov: Any, vocab: Tensor | None) -> SequentialHead:
    """Our view of SGLang's Markov head modules; the attributes tell vanilla, gated and rnn apart."""
    w2 = markov.markov_w2.weight
    return SequentialHead(
        w1=markov.markov_w1.weight,
        w2=w2 if vocab is None else w2[vocab].contiguous(),
        gate=_linear(markov.gate_proj) if hasattr(markov, "gate_proj") else None,
        joint=_linear(markov.joint_proj) if hasattr(markov, "joint_proj") else None,
    )
