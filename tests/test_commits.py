"""Where the rows of accepted paths stand, worked out from what the host knows."""

from __future__ import annotations

import pytest
import torch

from dspark_sgl.commits import path_rows


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
