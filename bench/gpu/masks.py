"""FlashInfer's paged prefill under our tree masks against dense attention in float64.

python -m bench.gpu.masks      one line; exits 1 when they differ
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from dspark_sgl.kernels.layout import TreeLayout, tree_layout
from dspark_sgl.kernels.mask import flat_mask

HEADS, KV_HEADS, DIM = 32, 8, 128
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
            worst = max(worst, distance(seed, batch))
            cases += 1
    return worst < CLOSE, f"{cases} batches, greatest relative distance {worst:.1e} (limit {CLOSE:g})"


def distance(seed: int, batch: int) -> float:
    """Of one random batch."""
    import flashinfer

    g = torch.Generator("cuda").manual_seed(1000 * batch + seed)
    layout = random_trees(batch, 33, g)
    prefix = torch.randint(0, 4000 if batch < 10 else 300, (batch,), generator=g, device="cuda")
    rows = torch.tensor(layout.widths, device="cuda")
    lens = prefix + rows
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    slots = torch.randperm(int(lens.sum()), generator=g, device="cuda").int()
    random = {"generator": g, "device": "cuda", "dtype": torch.bfloat16}
    keys, values = (torch.randn(len(slots), 1, KV_HEADS, DIM, **random) for _ in range(2))
    query = torch.randn(int(rows.sum()), HEADS, DIM, **random)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))
    wrapper.plan(
        layout.qo_indptr,
        starts,
        slots,
        torch.ones(batch, dtype=torch.int32, device="cuda"),
        HEADS,
        KV_HEADS,
        DIM,
        1,
        custom_mask=flat_mask(layout, prefix, total=int(prefix.sum()), longest=int(prefix.max())),
        q_data_type=torch.bfloat16,
    )
    got = wrapper.run(query, (keys, values)).double()
    wanted = torch.cat([dense(layout, i, int(prefix[i]), query, keys, values, slots, starts) for i in range(batch)])
    return float((got - wanted).norm() / wanted.norm())


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
