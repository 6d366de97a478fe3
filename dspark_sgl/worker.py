"""The worker: one decode round from plan to commit, for any drafter and any policy.

    plan -> propose -> select -> verify -> accept -> commit

SGLang's scheduler calls `forward_batch_generation` for every batch: a prefill chunk, or a decode round. A round in
which nobody speculates is a plain decode step of SGLang itself. The worker never knows which drafter it drives and
never looks into a policy: `steps.py` answers `plan` and `select`, and is told what became of it.

On a GPU the host only enqueues: the next kernels are queued before the last ones finish, and nothing here may block.
New lengths are published as soon as they are enqueued, and SGLang's scheduler goes on: it reads what this round brought
while the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.runtime_context import get_schedule, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from torch import Tensor

from dspark_sgl.kernels.layout import TreeLayout, chain_layout, tree_layout
from dspark_sgl.kernels.staging import Fetched
from dspark_sgl.kernels.walk import Acceptance, path_lengths
from dspark_sgl.spec_algos.protocol import Drafter, DrafterContext, Proposal, Round

from .assembly import build_governor
from .clock import PLAIN, PREFILL, ROUND
from .commits import early_commit, prefill_commit, step_commit, verify_commit
from .constraints import GrammarRows, constrain
from .decode_state import DecodeState
from .deterministic import draws_as_plain_steps_do
from .graphs import VerifyGraphs, capture_graphs, live_rows
from .outcome import attach_logprobs, step_result
from .plan import Plan
from .ranks import agree
from .request_view import RequestHistory
from .sampling import Sampling, accept
from .seen import Seen
from .steps import Steps
from .unserved import refuse_runner
from .verify_input import VerifyInput

Publish = Callable[[Tensor], None]


class SpecWorker(BaseSpecWorker):
    """Drives one drafter against the target model. Subclasses name the drafter class."""

    drafter_class: type[Drafter]

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        super().__init__()
        self._target_worker = target_worker
        self._target = target_worker.model_runner
        self.device = self._target.device
        refuse_runner(self._target, self.drafter_class.algorithm)
        self._drafter = self.drafter_class(
            DrafterContext(server_args, target_worker, gpu_id, nccl_port, block=get_spec().speculative_num_steps)
        )
        self._block = min(self._drafter.block, int(get_spec().speculative_num_steps))
        self._width = int(get_spec().speculative_num_draft_tokens)
        if self._drafter.max_nodes >= self._width:
            raise ValueError(
                f"{self._drafter.algorithm} proposes {self._drafter.max_nodes} nodes and the server keeps room for "
                f"{self._width - 1}; start it with --speculative-num-draft-tokens {self._drafter.max_nodes + 1}"
            )
        self._generator = torch.Generator(device=self.device).manual_seed(int(target_worker.random_seed))
        self._graphs: VerifyGraphs | None = None
        self._capture = CaptureHiddenMode.FULL if self._drafter.uses_target_hidden else CaptureHiddenMode.NULL
        seeds = draws_as_plain_steps_do(self._target.model)
        self._steps = Steps(not get_schedule().disable_overlap_schedule, self.device, seeds)

    # -- What SGLang asks of any speculative worker ------------------------------------------------------------------

    @property
    def draft_worker(self) -> Any | None:
        return self._drafter.draft_worker

    def alloc_memory_pool(
        self,
        memory_pool_config: Any = None,
        req_to_token_pool: Any = None,
        token_to_kv_pool_allocator: Any = None,
    ) -> None:
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        self._req_to_token: Tensor = self._target.req_to_token_pool.req_to_token
        self._drafter.ready()

    def init_cuda_graphs(self) -> None:
        """The last thing before requests come: everything can run now, so its cost is measured."""
        if self.draft_worker is not None:
            self.draft_worker.init_cuda_graphs(capture_decode_cuda_graph=False)
        self._graphs = capture_graphs(self._target, self._drafter, self._capture, self._block, self._width)
        self._steps.governor = build_governor(
            self._target, self._drafter, self._capture, self._block, self._width, self._graphs
        )

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        """None: new weights on a running server are the target's. A draft trained for the old ones stays exact."""
        return []

    def clear_cache_pool(self) -> None:
        """SGLang has flushed its cache, as it does after new weights."""
        self._drafter.target_changed()

    def __getattr__(self, name: str) -> Any:
        # SGLang asks its model worker for many things that only the target knows.
        if name.startswith("_target"):
            raise AttributeError(name)
        return getattr(self._target_worker, name)

    def watch(self, scheduler: Any) -> None:
        """SGLang's scheduler, whose queue and KV pool are signals."""
        if self._steps.governor is not None:
            self._steps.governor.load.watch(scheduler)

    def report(self) -> dict[str, object]:
        """What `/server_info` shows of us."""
        governor = self._steps.governor
        return {**(governor.report() if governor else {}), **self._steps.clock.report()}

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Publish | None = None,
        grammar_barrier: Any = None,
        *,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        """Run one batch of SGLang's scheduler and return what it commits.

        on_publish: to be handed the new lengths, int64 `[bs]`, as early as they can be asked of the device
        """
        publish = on_publish or _nobody
        if batch.forward_mode.is_idle():
            return self._idle(publish)
        self._steps.begin(batch)
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            result, kind = self._prefill(batch, publish), PREFILL
        else:
            result, kind = self._round(batch, publish)
        self._steps.end(kind, batch)
        return result

    # -- One batch ---------------------------------------------------------------------------------------------------

    def _idle(self, publish: Publish) -> GenerationBatchResult:
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        publish(nothing)
        return step_result(None, nothing, nothing, nothing, nothing, stride=1)

    def _prefill(self, batch: Any, publish: Publish) -> GenerationBatchResult:
        """A prefill chunk: the target's own step, then the drafter learns the tokens."""
        lens = batch.seq_lens
        publish(lens)
        result = self._target_worker.forward_batch_generation(batch, capture_hidden_mode=self._capture)
        output, anchors = result.logits_output, agree(result.next_token_ids.to(torch.int64))
        result.next_token_ids = anchors  # of several ranks, SGLang shall finish requests by the same token
        kept = output.hidden_states_token_indices
        self._drafter.observe(prefill_commit(batch, anchors, self._take_hidden(output), kept))
        result.new_seq_lens = lens
        result.next_draft_input = DecodeState(anchors)
        return result

    def _round(self, batch: Any, publish: Publish) -> tuple[GenerationBatchResult, str]:
        with self._steps.clock.phase("plan"):
            plan = self._steps.plan(batch)
        if max(plan.depths) == 0:
            return self._plain_step(batch, publish), PLAIN
        return self._speculate(batch, plan, publish), ROUND

    def _plain_step(self, batch: Any, publish: Publish) -> GenerationBatchResult:
        """Nobody speculates: SGLang's own decode step, sampler included; the drafter's context is kept in step."""
        slots, starts = self._slots(batch, 1).squeeze(1), batch.seq_lens_cpu.tolist()
        lens = batch.seq_lens + 1
        publish(lens)
        batch.forward_mode = ForwardMode.DECODE
        batch.input_ids = batch.spec_info.bonus_tokens
        batch.out_cache_loc = slots
        batch.seq_lens = lens
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        batch.spec_info = None
        result = self._target_worker.forward_batch_generation(batch, capture_hidden_mode=self._capture)
        output, anchors = result.logits_output, agree(result.next_token_ids.to(torch.int64))
        self._drafter.observe(step_commit(batch, starts, slots, anchors, self._take_hidden(output)))
        if batch.return_logprob and output.next_token_logprobs is not None:
            # Speculative results carry a row of tokens per request; here it is one token long.
            output.next_token_logprobs = output.next_token_logprobs.view(-1, 1)
        return step_result(
            output,
            anchors,
            torch.ones_like(anchors),
            anchors,
            lens,
            stride=1,
            can_run_cuda_graph=result.can_run_cuda_graph,
        )

    def _speculate(self, batch: Any, plan: Plan, publish: Publish) -> GenerationBatchResult:
        """Draft, verify, accept, commit."""
        clock, sampling = self._steps.clock, Sampling.of(batch.sampling_info, batch.seq_lens)
        anchors = batch.spec_info.bonus_tokens
        slots = self._slots(batch, self._width)
        with clock.phase("draft"):
            proposal = self._propose(batch, plan, sampling, slots)
            seen = Seen(proposal)
        with clock.phase("select"):
            if plan.settled:
                layout = chain_layout(anchors, proposal.tokens, plan.depths)
            else:
                layout = self._select(anchors, proposal, seen)
            rows = Fetched(torch.stack([layout.tokens, layout.parents])) if batch.has_grammar else None
        with clock.phase("verify"):
            result = self._verify(batch, layout, slots)
            output = result.logits_output
        with clock.phase("accept"):
            grammar = None if rows is None else GrammarRows.build(layout, rows.get(), batch)
            constrain(output.next_token_logits, layout, batch.sampling_info, grammar)
            accepted = _agreed(
                accept(layout, output.next_token_logits, proposal, sampling, plan.method, self._generator)
            )
            lens = batch.seq_lens + accepted.lengths
            publish(lens)
            emitted, host_path = accepted.emitted(layout), Fetched(accepted.path)
            self._steps.enqueued(layout, seen, host_path)
        with clock.phase("commit"):
            self._commit(batch, output, layout, accepted.path, emitted, host_path, slots)
            if batch.return_logprob:
                attach_logprobs(batch, output, layout, accepted, emitted)
        return step_result(
            output,
            emitted.flatten(),
            accepted.lengths,
            accepted.bonus,
            lens,
            stride=emitted.shape[1],
            can_run_cuda_graph=result.can_run_cuda_graph,
        )

    # -- The steps of a round ----------------------------------------------------------------------------------------

    def _slots(self, batch: Any, width: int) -> Tensor:
        """int64 `[bs, width]`: the KV slots of the positions from each anchor on, which the scheduler has reserved."""
        columns = batch.seq_lens[:, None] + torch.arange(width, device=batch.seq_lens.device)
        return self._req_to_token[batch.req_pool_indices[:, None], columns].to(torch.int64)

    def _propose(self, batch: Any, plan: Plan, sampling: Sampling, slots: Tensor) -> Proposal:
        proposal = self._drafter.propose(
            Round(
                anchors=batch.spec_info.bonus_tokens,
                lens=batch.seq_lens,
                lens_cpu=batch.seq_lens_cpu,
                req_slots=batch.req_pool_indices,
                cache_locs=slots,
                histories=[RequestHistory(request) for request in batch.reqs],
                depths=plan.depths,
                temperature=sampling.draft_temperature(plan.method),
                greedy=sampling.greedy,
                generator=self._generator,
                tree=plan.tree,
            )
        )
        tokens, parents = agree(proposal.tokens), proposal.parents
        if not self._drafter.on_device:
            # Who copies from the text may copy an image's placeholders, which have no embedding.
            tokens = tokens.clamp(max=self._target.model_config.vocab_size - 1)
        return replace(proposal, tokens=tokens, parents=None if parents is None else agree(parents.contiguous()))

    def _select(self, anchors: Tensor, proposal: Proposal, seen: Seen) -> TreeLayout:
        """The part of the proposal that is worth the target's time. Its shape is settled on the host."""
        kept = self._steps.select(seen)
        if seen.parents is None:
            return chain_layout(anchors, proposal.tokens, kept.sum(1).tolist())
        return tree_layout(anchors, proposal.tokens, seen.parents, kept)

    def _verify(self, batch: Any, layout: TreeLayout, slots: Tensor) -> GenerationBatchResult:
        """One target forward over every row of every tree; logits `[rows, V]` and hidden states `[rows, K H]`."""
        wide = layout if self._graphs is None else self._graphs.fit(layout)
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = wide.pack(wide.tokens)
        batch.out_cache_loc = wide.pack(slots[:, : wide.max_width])
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        batch.spec_info = VerifyInput(wide, batch.seq_lens, batch.seq_lens_cpu, self._capture)
        result = self._target_worker.forward_batch_generation(batch, is_verify=True, capture_hidden_mode=self._capture)
        live_rows(layout, wide, result.logits_output)
        return result

    def _commit(
        self,
        batch: Any,
        output: Any,
        layout: TreeLayout,
        path: Tensor,
        emitted: Tensor,
        host_path: Fetched,
        slots: Tensor,
    ) -> None:
        """Keep the accepted path: its KV moves to the front, and the drafter learns its hidden states.

        host_path: the same path on its way to the host, read only for a drafter that needs lengths there
        """
        hidden = self._take_hidden(output)
        if self._drafter.on_device and path.is_cuda:
            commit, kept = early_commit(batch, layout, path, emitted, slots, hidden)
        else:
            commit, kept = verify_commit(batch, layout, path, emitted, path_lengths(host_path.get()), slots, hidden)
        if not layout.is_chain:
            rows = layout.pack(slots[:, : layout.max_width])
            self._target.token_to_kv_pool.move_kv_cache(commit.cache_locs, rows[kept])
        self._drafter.observe(commit)

    def _take_hidden(self, output: Any) -> Tensor | None:
        """The hidden states a forward captured for the drafter; nobody else is handed them."""
        hidden = output.hidden_states if self._drafter.uses_target_hidden else None
        output.hidden_states = output.hidden_states_token_indices = None
        return hidden


def _agreed(accepted: Acceptance) -> Acceptance:
    return Acceptance(agree(accepted.path), agree(accepted.lengths), agree(accepted.bonus))


def _nobody(_lens: Tensor) -> None:
    """Where SGLang's scheduler waits for a step's end, it has no use for lengths before."""
