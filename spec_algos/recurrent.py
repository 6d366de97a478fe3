"""What drafters that feed on their own output share: the context, the first step and the steps after it.

A recurrent drafter (EAGLE, MTP) is a small decoder whose row i reads the target's hidden state of position i together
with the token at position i + 1, sits at position i and predicts the token at i + 2. It keeps its KV in the target's
slot of position i, so radix hits, retraction and compaction need nothing from it:

    position        p-2        p-1   |   p         p+1                     x0: the anchor, at p, not in the target's KV
    target hidden   H_{p-2}    H_{p-1}   y_{p-1}   y_p                     y_i: the module's own output of row i
    token           t_{p-1}    x0    |   x1        x2
    predicts        x0         x1    |   x2        x3
                    observe          |   propose

`observe` runs the module over committed rows, with true hidden states; what it yields in each request's last row is
kept, and is where `propose` starts. The rows that `propose` writes lie behind the committed ones and are written again,
from the target's own hidden states, when their tokens are accepted.

Never verifies, and never looks at load or policy.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput
from torch import Tensor

from dspark_sgl.kernels.draft_chain import ChainDraw, certainty
from dspark_sgl.kernels.staging import staged
from dspark_sgl.kernels.tree_draft import StepChildren

from .draft_model import DraftHead, grown, load_draft
from .protocol import Commit, Drafter, DrafterContext, Proposal, Round


class FeatureOutput(torch.nn.Module):
    """Stands where a draft model computes logits, and hands out what they would be computed from.

    So a context update costs no vocabulary product, and a hot vocabulary is one of the head alone.
    `hidden_states`: what the module's next step feeds on; `last_hidden_states`: what its head reads.
    """

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        lm_head: Any,
        forward_batch: ForwardBatch,
        aux_hidden_states: list[Tensor] | None = None,
        hidden_states_before_norm: Tensor | None = None,
    ) -> LogitsProcessorOutput:
        carry = hidden_states if hidden_states_before_norm is None else hidden_states_before_norm
        if aux_hidden_states is not None:
            carry = aux_hidden_states[0]
        return LogitsProcessorOutput(None, hidden_states=carry, last_hidden_states=hidden_states)


class RecurrentDrafter(Drafter):
    """A draft model of SGLang's that reads `spec_info.hidden_states`; a subclass gives it embedding and head."""

    trees: ClassVar[bool] = True
    uses_target_hidden: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True
    whole_chains: ClassVar[bool] = True

    def __init__(self, context: DrafterContext) -> None:
        super().__init__(context)
        target = context.target_worker.model_runner
        self._worker = load_draft(context, self.algorithm)
        self._runner = self._worker.model_runner
        self._vocab_size = int(target.model_config.vocab_size)
        self._head = self._share(self._runner.model, target.model)
        self._runner.model.logits_processor = FeatureOutput()

    @abstractmethod
    def _share(self, draft: Any, target: Any) -> DraftHead:
        """Give the draft what it borrows of the target, and say which head its features go through."""

    @property
    def block(self) -> int:
        return self.context.block

    @property
    def draft_worker(self) -> Any:
        return self._worker

    def target_changed(self) -> None:
        self._head.refresh()

    def ready(self) -> None:
        """Room for one row per request of SGLang's table. A row is written with its request's prefill, so none is
        ever read that another request left behind."""
        table, config = self._runner.req_to_token_pool.req_to_token, self._runner.model_config
        self._kept = torch.zeros(2, table.shape[0], config.hidden_size, dtype=config.dtype, device=table.device)

    def observe(self, commit: Commit) -> None:
        """Run the module over the committed rows, and keep the last of each request: features and carry."""
        if commit.hidden is None:
            raise RuntimeError(f"{self.algorithm} needs the target's hidden states and the forward captured none")
        features, carry = self._context_pass(commit)
        last = staged(commit.counts, features.device).cumsum(0) - 1
        self._kept[0, commit.req_slots] = features[last]
        self._kept[1, commit.req_slots] = carry[last]

    def propose(self, round: Round) -> Proposal:
        features, carry = self._kept[:, round.req_slots]
        depth, first = min(max(round.depths), self.block), (self._head.logits(features), carry)
        if round.tree is not None:
            # A step costs a pass of the module: a chain of the likeliest, and leaves beside it, which cost none.
            children = StepChildren(first, partial(self._step, round), depth, self._head.vocab)
            depths = staged(round.depths, round.anchors.device)
            return grown(children, round.anchors, depths, round.tree, round.temperature, round.greedy, round.generator)
        draw = ChainDraw(self._head.vocab, round.temperature, round.greedy, round.generator)
        q = draw.room(round.anchors.shape[0], depth, self._head.columns)
        columns: list[Tensor] = []
        confidence: list[Tensor] = []
        for k in range(depth):
            logits, carry = first if k == 0 else self._step(round, k, draw.tokens(columns[-1]), carry)
            columns.append(draw.columns(logits, None if q is None else q[:, k]))
            confidence.append(certainty(logits))
        chain = draw.chain(torch.stack(columns, dim=1), q)
        return Proposal.of_chain(chain, torch.stack(confidence, dim=1))

    def _context_pass(self, commit: Commit) -> tuple[Tensor, Tensor]:
        """`[n, H]` twice, over rows `(hidden of i, token at i + 1)` behind what is in the draft's KV already."""
        device, bs = commit.positions.device, len(commit.counts)
        counts, starts = torch.tensor(commit.counts), torch.tensor(commit.starts)
        ends = starts + counts
        return self._forward(
            ForwardBatch(
                forward_mode=ForwardMode.EXTEND,
                batch_size=bs,
                # A multimodal prompt has placeholders there that no embedding knows; they only make a draft worse.
                input_ids=commit.successors.clamp(max=self._vocab_size - 1),
                req_pool_indices=commit.req_slots,
                seq_lens=ends.to(device),
                out_cache_loc=commit.cache_locs,
                seq_lens_sum=int(ends.sum()),
                seq_lens_cpu=ends,
                positions=commit.positions,
                extend_num_tokens=int(counts.sum()),
                extend_seq_lens=counts.to(device, torch.int32),
                extend_prefix_lens=starts.to(device, torch.int32),
                extend_start_loc=(counts.cumsum(0) - counts).to(device, torch.int32),
                extend_seq_lens_cpu=list(commit.counts),
                extend_prefix_lens_cpu=list(commit.starts),
            ),
            commit.hidden,
        )

    def _step(self, round: Round, level: int, tokens: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[bs, Vq]` of what follows `tokens` at this level, 1 or more, and the carry `[bs, H]`: out of row
        `lens + level - 1`, which reads them and the output of the row before."""
        ends = round.lens_cpu + level
        features, carry = self._forward(
            ForwardBatch(
                forward_mode=ForwardMode.DECODE,
                batch_size=tokens.shape[0],
                input_ids=tokens,
                req_pool_indices=round.req_slots,
                seq_lens=round.lens + level,
                out_cache_loc=round.cache_locs[:, level - 1].contiguous(),
                seq_lens_sum=int(ends.sum()),
                seq_lens_cpu=ends,
                positions=round.lens + level - 1,
            ),
            carry,
        )
        return self._head.logits(features), carry

    def _forward(self, batch: ForwardBatch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features and carry of every row."""
        batch.capture_hidden_mode = CaptureHiddenMode.NULL
        batch.spec_info = EagleDraftExtendInput(hidden_states=hidden, num_tokens_per_req=1)
        self._runner.kv_index_translator.bind_own_plan(batch)
        output = self._runner.forward(batch).logits_output
        assert isinstance(output, LogitsProcessorOutput)
        assert output.hidden_states is not None and output.last_hidden_states is not None
        return output.last_hidden_states, output.hidden_states
