"""What DSpark and DFlash share: a parallel backbone over the target's hidden states that drafts a whole block at once.

SGLang's own model classes hold the weights (DeepSpec checkpoint format); everything that happens with them is here: the
context KV written from the target's hidden states, the block pass, the base logits. How tokens are drawn from those is
each drafter's own. Never looks at load or policy, and never verifies.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import can_dflash_slice_qkv_weight
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw
from dspark_sgl.kernels.linear import keep_packed, linear
from dspark_sgl.kernels.staging import staged
from dspark_sgl.kernels.tree_draft import Children, TreeShape

from .draft_graph import DraftGraphs, DraftInputs
from .draft_model import DraftHead, grown, hot_vocabulary, load_draft
from .protocol import Commit, Drafter, DrafterContext, Proposal, Round


@dataclass(frozen=True)
class BlockShape:
    """The rows of a block: `anchor, mask, mask, ...`, `rows` of them.

    skip: 0 where the anchor's row predicts the first draft and mask k the one after it; 1 where the anchor's row
        predicts nothing and mask k the token in its own place
    """

    rows: int
    skip: int
    mask_token: int

    @property
    def drafts(self) -> int:
        return self.rows - self.skip


class BlockDrafter(Drafter):
    """Anchor and mask tokens through the backbone; a subclass draws the tokens."""

    trees: ClassVar[bool] = True
    uses_target_hidden: ClassVar[bool] = True
    on_device: ClassVar[bool] = True
    whole_chains: ClassVar[bool] = True

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        target = context.target_worker.model_runner
        self._worker = load_draft(context, self.algorithm)
        self._runner = self._worker.model_runner
        self._model = self._runner.model
        self._shape = self._block_shape(self._runner.model_config.hf_config)
        self._block = min(self._shape.drafts, context.block)
        lm_head = unwrap_lora_layer(target.model.lm_head)
        embed_tokens = unwrap_lora_layer(target.model.get_input_embeddings())
        self._share(embed_tokens, lm_head)
        self._embed = None if hasattr(self._model, "forward_embed") else embed_tokens
        folder = Path(self._runner.model_config.model_path)
        self._head = DraftHead(lm_head, hot=hot_vocabulary(folder, lm_head.weight.device))
        self._graphs: DraftGraphs | None = None
        if torch.device(target.device).type == "cpu":
            for layer in self._model.layers:
                layer.self_attn.use_table_qk_norm_rope = False  # a Triton kernel; the model has a torch branch
        self._kv_weight = _stacked_kv_weight([layer.self_attn for layer in self._model.layers])
        self._block_input = DFlashVerifyInput(
            draft_token=torch.empty(0, dtype=torch.int64, device=target.device),
            positions=torch.empty(0, dtype=torch.int64, device=target.device),
            draft_token_num=self._shape.rows,
            custom_mask=None,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )

    @abstractmethod
    def _block_shape(self, config: Any) -> BlockShape:
        """Out of the draft's Hugging Face config."""

    @abstractmethod
    def _share(self, embed_tokens: Any, lm_head: Any) -> None:
        """Give the draft model what it borrows of the target."""

    @abstractmethod
    def _draw(self, logits: Tensor, hidden: Tensor, anchors: Tensor, draw: ChainDraw) -> Proposal:
        """A chain per request from base logits `[bs, D, Vq]` and features `[bs, D, H]`."""

    @abstractmethod
    def _children(self, logits: Tensor, hidden: Tensor) -> Children:
        """What may follow each node of a tree, from the same."""

    @property
    def block(self) -> int:
        return self._block

    @property
    def draft_worker(self) -> Any:
        return self._worker

    @property
    def block_rows(self) -> int:
        return self._shape.rows

    def ready(self) -> None:
        wanted = self._runner.device == "cuda" and not get_exec().graph.disable_decode_cuda_graph
        # The product with a sharded head is a collective of SGLang's own, which is left out of recordings.
        if wanted and get_parallel().tp_size == 1:
            self._graphs = DraftGraphs()

    def target_changed(self) -> None:
        self._head.refresh()

    def propose(self, round: Round) -> Proposal:
        hidden, graphs, kind = self._backbone(round), self._graphs, (round.tree, round.temperature is None)
        if graphs is not None and not graphs.reserve(kind, len(round.depths), *self._q_values(round)):
            graphs = None
        # A recording drafts the whole block; what is deeper than was asked for is not looked at.
        depth = self._block if graphs is not None else min(max(round.depths), self._block)
        depths = None if round.tree is None else staged(round.depths, hidden.device)
        inputs = DraftInputs(hidden[:, :depth], round.anchors, round.greedy, round.temperature, depths)
        draft = partial(self._draft, round.tree, round.generator)
        if graphs is None:
            return draft(inputs)
        return graphs.run(kind, draft, inputs, round.generator)

    def _q_values(self, round: Round) -> tuple[int, int]:
        """Upper bounds on the float32 values of q that one request keeps, and that it has at work at a time. Kept is
        `Vq` per depth of a chain or node of a tree (`KeptDistributions`); drafts that are chosen keep none."""
        columns = self._head.columns
        if round.temperature is None:
            return 0, columns
        if round.tree is None:
            return self._block * columns, columns
        nodes = round.tree.max_nodes + 2
        return nodes * columns, nodes * columns

    def _draft(self, tree: TreeShape | None, generator: torch.Generator, inputs: DraftInputs) -> Proposal:
        """Tokens from the features of the block: a function of tensors alone, so that a graph can hold it."""
        hidden = inputs.hidden
        logits = self._head.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        if tree is None:
            draw = ChainDraw(self._head.vocab, inputs.temperature, inputs.greedy, generator)
            return self._draw(logits, hidden, inputs.anchors, draw)
        assert inputs.depths is not None
        children = self._children(logits, hidden)
        return grown(children, inputs.anchors, inputs.depths, tree, inputs.temperature, inputs.greedy, generator)

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
        """`[bs, drafts, H]`: features of the block, at positions `lens .. lens + rows - 1`, rows that predict only."""
        bs, rows = round.anchors.shape[0], self._shape.rows
        block = torch.nn.functional.pad(round.anchors[:, None], (0, rows - 1), value=self._shape.mask_token)
        positions = round.lens[:, None] + torch.arange(rows, device=round.lens.device)
        ends = round.lens_cpu + rows
        batch = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=bs,
            input_ids=block.flatten(),
            input_embeds=self._graph_embeds(block),
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
        return output.hidden_states.view(bs, rows, -1)[:, self._shape.skip :]

    def _graph_embeds(self, block: Tensor) -> Tensor | None:
        """What SGLang's graph is handed where the model does not say that it embeds by itself; eagerly it does."""
        graphs = self._runner.decode_cuda_graph_runner
        if self._embed is None or not isinstance(graphs, DecodeCudaGraphRunner) or len(block) > graphs.max_bs:
            return None
        return self._embed(block.flatten())


def _stacked_kv_weight(attentions: list[Any]) -> Tensor | None:
    """`[layers * 2 kv, H]`, or None where a layer does more than multiply (quantised, biased, scaled values)."""
    rows = []
    for attention in attentions:
        projection = attention.qkv_proj
        plain, _ = can_dflash_slice_qkv_weight(projection)
        if not plain or projection.bias is not None or attention.v_scale is not None:
            return None
        rows.append(projection.weight[attention.q_size : attention.q_size + 2 * attention.kv_size])
    return keep_packed(torch.cat(rows))
