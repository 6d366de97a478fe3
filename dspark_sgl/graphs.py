"""CUDA graphs for what a round runs: the target's verify forward at a ladder of widths, its plain step, a block pass.

A graph has one width for every request of its batch. A ragged forest is padded to the next rung with dead rows: they
write into slots that the request has reserved anyway, and nobody reads them. Chains have rungs of their own, without a
mask, which costs FlashInfer several times the attention. What no rung holds runs eagerly. SGLang's own runner captures
and replays each rung; which one, and with what mask, is ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec

from dspark_sgl.kernels.layout import TreeLayout, chain_layout
from dspark_sgl.spec_algos.protocol import Drafter

from .plan import MOST_ROWS
from .verify_input import VerifyInput
from .verify_plan import plan_on_host

logger = logging.getLogger(__name__)

DEFAULT_REQUESTS = 256


class VerifyGraphs:
    """What SGLang's target runner replays: its `decode_cuda_graph_runner`.

    chains, trees: the rungs, rows of each request, ascending; capture: what a forward keeps for the drafter
    """

    _said = False  # that a round was more than any rung holds

    def __init__(self, target: Any, chains: list[int], trees: list[int], capture: CaptureHiddenMode) -> None:
        room = AttentionRoom(target, (1, *chains, *trees))
        with _capturing(target, 1):
            self._decode = _DecodeRung(target, room, capture)
        self._rungs: dict[bool, dict[int, DecodeCudaGraphRunner]] = {True: {}, False: {}}
        for is_chain, widths in ((True, chains), (False, trees)):
            for width in widths:
                with _capturing(target, width):
                    self._rungs[is_chain][width] = _VerifyRung(target, room, width, is_chain, capture)
        self._last: DecodeCudaGraphRunner = self._decode
        logger.info(
            "dspark: CUDA graphs of 1 row a request, of chains of %s, of trees of %s",
            *(", ".join(map(str, widths)) or "none" for widths in (chains, trees)),
        )

    @property
    def widths(self) -> list[list[int]]:
        return [list(rungs) for rungs in self._rungs.values()]

    def fit(self, layout: TreeLayout) -> TreeLayout:
        """The layout itself, or padded to the next rung that holds its batch."""
        for width, rung in self._rungs[layout.is_chain].items():
            if width >= layout.max_width and layout.batch_size <= rung.max_bs:
                return layout.widened(layout.batch_size, width)
        if not self._said:
            self._said = True
            size = f"{layout.batch_size} requests of up to {layout.max_width} rows"
            logger.info("dspark: a round of %s is more than any CUDA graph holds; such rounds run eagerly", size)
        return layout

    # -- What SGLang asks of the runner ------------------------------------------------------------------------------

    def can_run_graph(self, batch: ForwardBatch) -> bool:
        rung = self._rung(batch)
        return rung is not None and rung.can_run_graph(batch)

    def execute(self, batch: ForwardBatch, pp_proxy_tensors: Any = None) -> Any:
        rung = self._rung(batch)
        assert rung is not None
        if isinstance(batch.spec_info, VerifyInput):
            batch.spec_info.absent = rung.seq_len_fill_value
        self._last = rung
        return rung.execute(batch, pp_proxy_tensors)

    @property
    def bs(self) -> int:
        """Requests of the last graph that was replayed, padding included."""
        return int(self._last.bs)

    def _rung(self, batch: ForwardBatch) -> DecodeCudaGraphRunner | None:
        if batch.forward_mode.is_decode():
            return self._decode
        spec = batch.spec_info
        if isinstance(spec, VerifyInput) and spec.layout.is_uniform:
            return self._rungs[spec.layout.is_chain].get(spec.layout.max_width)
        return None


def capture_graphs(
    target: Any, drafter: Drafter, capture: CaptureHiddenMode, block: int, width: int
) -> VerifyGraphs | None:
    """Capture them and hand them to SGLang's runners; None without a CUDA device, or where graphs are switched off."""
    if target.device != "cuda" or get_exec().graph.disable_decode_cuda_graph:
        return None
    widths = ladder(width, block)
    # A tree of fewer nodes than the block has takes as many rows as the block.
    chains, trees = [rung for rung in widths if rung <= block + 1], [rung for rung in widths if rung > block]
    _give_logits_room(target, (1, *widths, drafter.block_rows or 1))
    graphs = VerifyGraphs(target, chains, trees, capture)
    target.decode_cuda_graph_runner = graphs
    if drafter.block_rows and drafter.draft_worker is not None:
        runner, rows = drafter.draft_worker.model_runner, drafter.block_rows
        if runner.graph_shared_output is None:
            runner.graph_shared_output = target.graph_shared_output  # one is done with it before the other begins
        AttentionRoom(runner, (rows,)).lend(runner.attn_backend)
        with _capturing(runner, rows):
            runner.decode_cuda_graph_runner = DecodeCudaGraphRunner(
                runner, speculative_num_steps=rows, speculative_num_draft_tokens=rows
            )
    return graphs


def ladder(width: int, block: int) -> list[int]:
    """Rows per request worth a graph: a whole block and its anchor, the widest tree, powers of two not near either."""
    whole = {min(block + 1, width), width}
    powers = (2**k for k in range(1, width.bit_length()))
    return sorted(whole | {p for p in powers if p < width and all(abs(p - w) > p // 4 for w in whole)})


def batch_sizes(width: int, most: int) -> list[int]:
    """Requests of the graphs of one rung: powers of two and the most, which is `most` or what `MOST_ROWS` allows."""
    most = max(1, min(most, MOST_ROWS // width))
    return sorted({most, *(2**k for k in range(most.bit_length()))})


def rung_sizes(runner: Any, width: int) -> list[int]:
    """Requests of the graphs of `width` rows each: up to `--cuda-graph-max-bs-decode`, or what SGLang chose for this
    GPU, and no more than FlashInfer's scratch memory holds."""
    most = int(get_exec().graph.cuda_graph_config.decode.max_bs or DEFAULT_REQUESTS)
    return batch_sizes(width, min(most, most_in_workspace(runner.attn_backend, width)))


def most_in_workspace(backend: Any, width: int) -> int:
    """The most requests of `width` rows whose attention, which a graph always splits over the KV, fits FlashInfer's
    scratch memory. Its plan reserves `head_dim + 1` float32 per query head and row, in tiles of 128 packed rows (a row
    times its query heads per KV head); rounding up costs a request a tile at most, `128 kv_heads / qo_heads` rows."""
    heads = backend.indices_updater_prefill
    spare = math.ceil(128 * heads.num_kv_heads / heads.num_qo_heads)
    return int(backend.workspace_buffer.numel() // (4 * heads.num_qo_heads * (heads.head_dim + 1) * (width + spare)))


def live_rows(layout: TreeLayout, wide: TreeLayout, output: Any) -> None:
    """Drop the dead rows of a forward's logits and hidden states again, in place."""
    if wide is layout:
        return
    alive = layout.owner * wide.max_width + layout.place % layout.max_width
    output.next_token_logits = output.next_token_logits[alive]
    if output.hidden_states is not None:
        output.hidden_states = output.hidden_states[alive]


def _give_logits_room(runner: Any, widths: tuple[int, ...]) -> None:
    """The buffer that a server with SGLang's own decode graphs would have made for them."""
    if runner.graph_shared_output is None:
        rows = max(rung_sizes(runner, width)[-1] * width for width in widths)
        runner.graph_shared_output = GraphSharedOutput(device=runner.device, max_rows=rows)


@contextmanager
def _capturing(runner: Any, width: int) -> Iterator[None]:
    """SGLang's runner takes its batch sizes from the server's settings."""
    decode = get_exec().graph.cuda_graph_config.decode
    before = decode.bs
    decode.bs = rung_sizes(runner, width)
    try:
        yield
    finally:
        decode.bs = before


class AttentionRoom:
    """Where all rungs of a runner keep their KV indices and packed masks, which every replay writes anew.

    SGLang would make both for each rung, with an index and a byte per row and token of the context. An index per
    request and token does, and a bit per row: 170 MB instead of 6 GB for 256 requests of 128k tokens.
    """

    def __init__(self, runner: Any, widths: tuple[int, ...]) -> None:
        context = runner.model_config.context_len + max(widths)
        rungs = [(rung_sizes(runner, width)[-1], width) for width in widths]
        indices = max(requests for requests, _ in rungs) * context
        mask = max(requests * ((width * context + 7) // 8) for requests, width in rungs)
        self._indices = torch.zeros(indices, dtype=torch.int32, device=runner.device)
        self._mask = torch.zeros(mask, dtype=torch.uint8, device=runner.device)

    def lend(self, backend: Any) -> Any:
        """The backend, which will use it for the graphs it is asked to prepare."""
        prepare = backend.init_cuda_graph_state

        def within(max_bs: int, max_num_tokens: int) -> None:
            prepare(max_bs, max_num_tokens, kv_indices_buf=self._indices)
            backend.cuda_graph_custom_mask = self._mask

        backend.init_cuda_graph_state = within
        return backend


class _VerifyRung(DecodeCudaGraphRunner):
    """Verify forwards of `width` rows per request, of trees under a mask. What an attention backend plans for one rung
    is not what another needs, so each has its own; the scratch memory is shared."""

    def __init__(
        self, target: Any, room: AttentionRoom, width: int, is_chain: bool, capture: CaptureHiddenMode
    ) -> None:
        self._is_chain, self._capture_hidden = is_chain, capture
        backend = room.lend(target._get_attention_backend())
        super().__init__(
            target, attn_backend=backend, speculative_num_steps=width - 1, speculative_num_draft_tokens=width
        )
        for wrappers in backend.prefill_cuda_graph_metadata.values():
            for wrapper in wrappers:
                plan_on_host(wrapper)

    def get_spec_info(self, num_tokens: int) -> VerifyInput:
        width = int(self.captured_req_width)
        drafts = torch.zeros(num_tokens // width, width, dtype=torch.int64, device=self.device)
        layout = chain_layout(drafts[:, 0], drafts, [width - 1] * drafts.shape[0])
        layout = replace(layout, is_chain=self._is_chain)
        lens = self.buffers.seq_lens[: drafts.shape[0]]
        return VerifyInput(layout, lens, torch.full((len(lens),), self.seq_len_fill_value), self._capture_hidden)


class _DecodeRung(DecodeCudaGraphRunner):
    """SGLang's own decode step, which its runner captures only for servers that never speculate."""

    def __init__(self, target: Any, room: AttentionRoom, capture: CaptureHiddenMode) -> None:
        self._capture_hidden = capture
        super().__init__(
            target,
            attn_backend=room.lend(target._get_attention_backend()),
            speculative_num_steps=0,
            speculative_num_draft_tokens=1,
        )

    @property
    def capture_forward_mode(self) -> ForwardMode:
        return ForwardMode.DECODE

    @capture_forward_mode.setter
    def capture_forward_mode(self, mode: ForwardMode) -> None:
        """SGLang's constructor sets what a speculative server verifies with."""

    def get_spec_info(self, num_tokens: int) -> None:
        self.capture_hidden_mode = self._capture_hidden
