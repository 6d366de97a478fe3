"""What can be said of the CUDA graphs without a GPU: which rung a batch takes, and what its padding sees."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark_sgl.graphs import VerifyGraphs, batch_sizes, ladder, live_rows, most_in_workspace
from dspark_sgl.kernels.layout import TreeLayout, chain_layout, tree_layout
from dspark_sgl.verify_input import VerifyInput
from dspark_sgl.verify_plan import plan_on_host


def ragged_chain() -> TreeLayout:
    drafts = torch.tensor([[11, 12, 13], [21, 22, 23]])
    return chain_layout(torch.tensor([10, 20]), drafts, [3, 1])


def ragged_tree() -> TreeLayout:
    drafts, parents = torch.tensor([[11, 12, 13], [21, 22, 23]]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    return tree_layout(torch.tensor([10, 20]), drafts, parents, torch.tensor([[True] * 3, [True, False, False]]))


@pytest.mark.parametrize(
    ("width", "block", "rungs"),
    [(7, 6, [2, 4, 7]), (33, 6, [2, 4, 7, 16, 33]), (17, 7, [2, 4, 8, 17]), (2, 1, [2]), (16, 15, [2, 4, 8, 16])],
)
def test_the_ladder_has_the_block_and_the_widest_tree(width: int, block: int, rungs: list[int]) -> None:
    assert ladder(width, block) == rungs


def test_wide_graphs_are_of_fewer_requests() -> None:
    assert batch_sizes(1, 256)[-1] == 256 and batch_sizes(7, 48) == [1, 2, 4, 8, 16, 32, 48]
    assert batch_sizes(33, 256) == [1, 2, 4, 8, 16, 32, 62] and batch_sizes(5000, 256) == [1]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 32, 2), (32, 8, 8), (64, 8, 33), (9, 3, 7)])
def test_attention_fits_the_scratch_memory(heads: int, kv_heads: int, width: int) -> None:
    """By the sizes in FlashInfer's scheduler.cuh, of a workspace of 384 MiB and heads of 128."""
    workspace, group = 384 * 2**20, heads // kv_heads
    sizes = SimpleNamespace(num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=128)
    buffer = torch.empty(workspace, dtype=torch.uint8, device="meta")
    most = most_in_workspace(SimpleNamespace(indices_updater_prefill=sizes, workspace_buffer=buffer), width)

    def asked(requests: int) -> int:
        tiles = math.ceil(requests * width * group / 128) + requests - 1
        return 4 * heads * math.ceil(tiles * 128 / group) * (128 + 1)

    assert asked(most) <= workspace < asked(most + most // 10)


class Rung:
    """Of SGLang's runner, all that choosing one looks at."""

    def __init__(self, max_bs: int) -> None:
        self.max_bs = max_bs


def graphs(widths: list[int], most: int) -> VerifyGraphs:
    made: Any = object.__new__(VerifyGraphs)
    made._rungs = {True: {width: Rung(most) for width in widths}, False: {}}
    return made


def test_a_batch_takes_the_next_rung_that_holds_it() -> None:
    layout = ragged_chain()
    assert graphs([2, 8], 2).fit(layout).widths == (8, 8)
    assert graphs([4, 8], 2).fit(layout).widths == (4, 4)
    assert graphs([2, 3], 2).fit(layout) is layout  # wider than any
    assert graphs([4], 1).fit(layout) is layout  # more requests than any
    uniform = chain_layout(torch.tensor([1]), torch.tensor([[2, 3, 4]]), [3])
    assert graphs([4], 1).fit(uniform) is uniform
    tree = ragged_tree()
    assert graphs([2, 8], 2).fit(tree) is tree  # a chain's rungs have no mask


@pytest.mark.parametrize("layout", [ragged_chain(), ragged_tree()])
def test_nobody_sees_dead_rows(layout: TreeLayout) -> None:
    wide = layout.widened(3, 6)
    assert wide.widths == (6, 6, 6) and wide.is_uniform
    mask = wide.ancestor_mask().view(3, 6, 6)
    before = layout.ancestor_mask()
    for request, width in enumerate(layout.widths):
        first = sum(layout.widths[:request])
        assert torch.equal(mask[request, :width, :width], before[first : first + width, :width])
        assert not mask[request, :width, width:].any()
    # What they see themselves: of a tree nobody, of a chain whatever is before them, as without a mask.
    alone = torch.ones(6, 6).tril().bool() if layout.is_chain else torch.eye(6, dtype=torch.bool)
    assert torch.equal(mask[1, layout.widths[1] :], alone[layout.widths[1] :]) and torch.equal(mask[2], alone)


def test_the_live_rows_come_back_in_their_order() -> None:
    layout = ragged_tree()
    wide = layout.widened(2, 5)
    logits = wide.pack(wide.tokens).float()[:, None]
    output = SimpleNamespace(next_token_logits=logits, hidden_states=logits * 2)
    live_rows(layout, wide, output)
    assert torch.equal(output.next_token_logits[:, 0], layout.pack(layout.tokens).float())
    assert torch.equal(output.hidden_states, output.next_token_logits * 2)


class Translator:
    """Writes down what it is asked to pack."""

    lens: Tensor

    def pack_read_stream(self, plan: Any, *, seq_lens: Tensor, **_: Any) -> None:
        self.lens = seq_lens


def asked(lens: Tensor) -> dict[str, Any]:
    """What FlashInfer's backend asks with, of a batch of two that a graph pads to four."""
    return {
        "req_pool_indices": torch.tensor([1, 2, 0, 0]),
        "paged_kernel_lens": lens,
        "paged_kernel_lens_sum": int(lens.sum()),
        "translator": Translator(),
        "plan": None,
    }


def test_a_graphs_batch_may_have_more_requests_than_ours() -> None:
    lens = torch.tensor([5, 9, 1, 1])  # two of ours, and two that fill the graph
    spec = VerifyInput(ragged_tree().widened(2, 4), lens[:2], lens[:2], None)  # type: ignore[arg-type]
    given = asked(lens)
    _, kv_indptr, qo_indptr, mask = spec.generate_attn_arg_prefill(**given)
    assert qo_indptr.tolist() == [0, 4, 8, 12, 16]
    assert given["translator"].lens.tolist() == [9, 13, 5, 5] and kv_indptr.tolist() == [0, 9, 22, 27, 32]
    assert isinstance(mask, Tensor) and mask.shape == (4 * (9 + 13 + 5 + 5),)
    assert mask[-20:].view(4, 5)[:, 0].all()  # the last request's prefix, one token
    assert torch.equal(mask[-20:].view(4, 5)[:, 1:], torch.eye(4, dtype=torch.bool))


def test_a_chain_has_no_mask() -> None:
    lens = torch.tensor([5, 9])
    spec = VerifyInput(ragged_chain(), lens, lens, None)  # type: ignore[arg-type]
    given = asked(lens) | {"req_pool_indices": torch.tensor([1, 2])}
    _, kv_indptr, qo_indptr, mask = spec.generate_attn_arg_prefill(**given)
    assert mask is None and spec.custom_mask is None
    assert qo_indptr.tolist() == [0, 4, 6] and kv_indptr.tolist() == [0, 9, 20]


class Wrapper:
    """Has room for a mask, as a graph's wrapper does, and writes down what it is planned with."""

    def __init__(self, requests: int) -> None:
        self._custom_mask_buf = torch.zeros(4096, dtype=torch.uint8)
        self._mask_indptr_buf = torch.zeros(requests + 1, dtype=torch.int32)

    def plan(self, *given: Any, custom_mask: Any = None, **how: Any) -> None:
        self.given, self.mask, self.how = given, custom_mask, how

    begin_forward = plan


def test_a_replay_is_planned_by_what_the_host_knows() -> None:
    """The same plan as without: qo and kv where FlashInfer would have read them, and the mask it would have packed."""
    g = torch.Generator().manual_seed(0)
    parents = torch.tensor([[0, 0, 1, 3], [0, 1, 1, -1]])
    layout = tree_layout(
        torch.zeros(2, dtype=torch.int64), torch.randint(9, (2, 4), generator=g), parents, parents >= 0
    )
    lens = torch.tensor([5, 9, 1, 1])
    spec = VerifyInput(layout.widened(2, 8), lens[:2], lens[:2], None)  # type: ignore[arg-type]
    given = asked(lens)
    _, kv_indptr, qo_indptr, flat = spec.generate_attn_arg_prefill(**given)
    spec.absent = 1
    kv_indices, on_device, _, host = spec.generate_attn_arg_prefill(**given)
    wrapper = Wrapper(4)
    plan_on_host(wrapper)
    wrapper.begin_forward(None, on_device, kv_indices, None, 32, 8, custom_mask=host, non_blocking=True)
    assert wrapper.given[0].tolist() == qo_indptr.tolist() and wrapper.given[1].tolist() == kv_indptr.tolist()
    assert wrapper.given[3].tolist() == [1] * 4 and wrapper.given[4:] == (32, 8) and wrapper.mask is None
    for request, entries in enumerate(flat.split((8 * (lens + 8)).tolist())):
        start, end = wrapper._mask_indptr_buf[request : request + 2].tolist()
        packed = np.packbits(entries.numpy(), bitorder="little")
        assert wrapper._custom_mask_buf[start:end].tolist() == packed.tolist()


def test_what_is_no_plan_of_ours_reaches_flashinfer_as_it_is() -> None:
    wrapper, mask = Wrapper(1), torch.ones(3)
    plan_on_host(wrapper)
    wrapper.begin_forward(1, 2, 3, 4, 5, custom_mask=mask, window_left=7)
    assert wrapper.given == (1, 2, 3, 4, 5) and wrapper.mask is mask and wrapper.how == {"window_left": 7}
