"""FlashInfer's paged prefill under our tree masks against dense attention in float64.

python -m bench.gpu.masks      one line; exits 1 when they differ
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from dspark_sgl.kernels.layout import TreeLayout, tree_layout
from dspark_sgl.kernels.mask import flat_mask
from dspark_sgl.verify_plan import HostPlan, plan_on_host

HEADS, KV_HEADS, DIM = 32, 8, 128
WIDTH = 33
CLOSE = 2e-2
"""Of bfloat16 operands: relative distance of the whole output."""


def main() -> int:
    passed, said = check_masks()
    print(said)
    return 0 if passed else 1


def check_masks() -> tuple[bool, str]:
    """Ragged trees of 1 to 33 rows behind prefixes of 0 to 4000 tokens."""
    if not torch.cuda.is_available():
        return True, "not run, no GPU"
    if find_spec("flashinfer") is None:
        return True, "not run, FlashInfer is not installed"
    worst, cases = 0.0, 0
    for seed in range(20):
        for batch in (1, 3, 16):
            for graph in (False, True):
                worst = max(worst, distance(seed, batch, graph))
                cases += 1
    return worst < CLOSE, f"{cases} batches, greatest relative distance {worst:.1e} (limit {CLOSE:g})"


def distance(seed: int, batch: int, graph: bool) -> float:
    """Of one random batch; graph: as many rows for everybody, planned as for a graph that is replayed."""
    import flashinfer

    g = torch.Generator("cuda").manual_seed(1000 * batch + seed)
    layout = random_trees(batch, WIDTH, g)
    if graph:
        layout = layout.widened(batch, WIDTH)
    prefix = torch.randint(0, 4000 if batch < 10 else 300, (batch,), generator=g, device="cuda")
    rows = torch.tensor(layout.widths, device="cuda")
    lens = prefix + rows
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    slots = torch.randperm(int(lens.sum()), generator=g, device="cuda").int()
    random = {"generator": g, "device": "cuda", "dtype": torch.bfloat16}
    keys, values = (torch.randn(len(slots), 1, KV_HEADS, DIM, **random) for _ in range(2))
    query = torch.randn(int(rows.sum()), HEADS, DIM, **random)
    room = room_for_a_graph(batch, len(slots)) if graph else {}
    workspace = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, backend="fa2", **room)
    mask = flat_mask(layout, prefix, total=int(prefix.sum()), longest=int(prefix.max()))
    last_page = torch.ones(batch, dtype=torch.int32, device="cuda")
    sizes, kind = (HEADS, KV_HEADS, DIM, 1), {"q_data_type": torch.bfloat16}
    wrapper.begin_forward(layout.qo_indptr, starts, slots, last_page, *sizes, custom_mask=mask, **kind)
    if graph:
        plan_on_host(wrapper)
        host = HostPlan(layout, prefix, prefix.cpu())
        wrapper._custom_mask_buf.zero_()
        wrapper.begin_forward(host.qo_indptr, host.kv_indptr, slots, last_page, *sizes, custom_mask=host, **kind)
    got = wrapper.run(query, (keys, values)).double()
    wanted = torch.cat([dense(layout, i, int(prefix[i]), query, keys, values, slots, starts) for i in range(batch)])
    return float((got - wanted).norm() / wanted.norm())


def room_for_a_graph(batch: int, slots: int) -> dict[str, Any]:
    """The buffers that SGLang gives a wrapper before it captures a graph."""

    def numbers(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device="cuda")

    return {
        "use_cuda_graph": True,
        "qo_indptr_buf": numbers(batch + 1),
        "paged_kv_indptr_buf": numbers(batch + 1),
        "paged_kv_indices_buf": numbers(slots),
        "paged_kv_last_page_len_buf": numbers(batch),
        "custom_mask_buf": numbers(WIDTH * (slots + 1), torch.uint8),
        "mask_indptr_buf": numbers(batch + 1),
    }


def dense(
    layout: TreeLayout,
    request: int,
    prefix: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """float64 `[rows, heads, dim]` of one request: every row sees the prefix, its ancestors and itself."""
    rows, first = layout.widths[request], int(layout.qo_indptr[request])
    mine = slots[starts[request] : starts[request + 1]].long()
    k, v = (x[mine, 0].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    q = query[first : first + rows].double()
    see = torch.zeros(rows, prefix + rows, dtype=torch.bool, device=q.device)
    see[:, :prefix] = True
    for row in range(rows):
        at = row
        while at >= 0:
            see[row, prefix + at] = True
            at = int(layout.parents[request, at])
    scores = torch.einsum("rhd,khd->hrk", q, k) / DIM**0.5
    return torch.einsum("hrk,khd->rhd", scores.masked_fill(~see, -torch.inf).softmax(-1), v)


def random_trees(batch: int, width: int, g: torch.Generator) -> TreeLayout:
    """Any node may be any earlier node's child."""
    device = g.device
    nodes = width - 1
    parents = torch.stack([torch.randint(0, n + 1, (batch,), generator=g, device=device) for n in range(nodes)], dim=1)
    count = torch.randint(0, nodes + 1, (batch, 1), generator=g, device=device)
    parents = parents.where(torch.arange(nodes, device=device) < count, -1)
    tokens = torch.zeros_like(parents)
    return tree_layout(tokens[:, 0], tokens, parents, torch.ones_like(parents, dtype=torch.bool))


if __name__ == "__main__":
    raise SystemExit(main())
