"""Where the rows of accepted paths stand, worked out from what the host knows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dspark_sgl.commits import early_commit, path_rows, verify_commit
from dspark_sgl.kernels.layout import tree_layout
from dspark_sgl.kernels.walk import path_lengths, walk
from dspark_sgl.spec_algos.protocol import DEAD_SLOT


@pytest.mark.parametrize("seed", range(10))
def test_rows_of_the_accepted_paths_are_those_before_each_end(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    requests, width = 1 + seed % 5, 1 + seed % 7
    lengths = torch.randint(1, width + 1, (requests,), generator=g)
    starts = torch.randint(0, 100, (requests,), generator=g)
    place = torch.arange(width).expand(requests, width)
    on_path = place < lengths[:, None]
    rows = torch.arange(requests * width).view(requests, width)
    got = path_rows(lengths.tolist(), width, starts.tolist())
    assert torch.equal(got[0], rows[on_path])
    assert torch.equal(got[1], (starts[:, None] + place)[on_path])


@pytest.mark.parametrize("seed", range(20))
def test_an_early_commit_is_the_same_and_what_is_more_is_dead(seed: int) -> None:
    """Random trees, walked: the live rows are those of a commit that waited for the lengths, in their order."""
    g = torch.Generator().manual_seed(seed)
    requests, nodes = 1 + seed % 4, 1 + seed % 9
    parents = torch.stack([torch.randint(0, n + 1, (requests,), generator=g) for n in range(nodes)], dim=1)
    drafts = torch.randint(2, (requests, nodes), generator=g)
    layout = tree_layout(drafts[:, 0], drafts, parents, torch.ones_like(parents, dtype=torch.bool))
    accepted = walk(layout, torch.randint(2, (requests, nodes + 1), generator=g))
    lens = torch.randint(100, (requests,), generator=g)
    slots = 1 + torch.randperm(requests * (nodes + 1), generator=g).view(requests, nodes + 1)
    hidden = torch.randn(sum(layout.widths), 3, generator=g)
    batch = SimpleNamespace(seq_lens=lens, seq_lens_cpu=lens, req_pool_indices=torch.arange(requests))
    emitted = accepted.emitted(layout)
    early, rows = early_commit(batch, layout, accepted.path, emitted, slots, hidden)
    lengths = path_lengths(accepted.path)
    late, kept = verify_commit(batch, layout, accepted.path, emitted, lengths, slots, hidden)
    live = early.cache_locs != DEAD_SLOT
    assert early.counts == [accepted.path.shape[1]] * requests and early.starts == late.starts
    for mine, theirs in (
        (rows, kept),
        (early.positions, late.positions),
        (early.cache_locs, late.cache_locs),
        (early.successors, late.successors),
        (early.hidden, late.hidden),
    ):
        assert mine is not None and theirs is not None and torch.equal(mine[live], theirs)
