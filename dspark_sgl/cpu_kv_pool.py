"""SGLang's KV bookkeeping on a CPU: torch indexing where the original launches Triton. Never allocates a slot."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from torch import Tensor


class CpuKVPool(MHATokenToKVPool):
    """Compaction of an accepted path (`move_kv_cache`) is an index copy per layer."""

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None
        self.use_native_move_kv_cache = True


def assign_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """`req_to_token[request, start:end] = its share of out_cache_loc`, requests one after the other.

    Stands in for SGLang's Triton launch of the same name. req_pool_indices, start_offset, end_offset: `[bs]`
    """
    counts = (end_offset - start_offset)[:batch_size].long()
    owner = torch.arange(batch_size).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    column = start_offset[owner].long() + torch.arange(owner.shape[0]) - first[owner]
    req_to_token[req_pool_indices[owner].long(), column] = out_cache_loc[: owner.shape[0]].to(req_to_token.dtype)


def last_slots(req_to_token: Tensor, req_pool_indices: Tensor, lens: Tensor) -> Tensor:
    """`[bs]`: the slot of each request's last token, whose page the next one may share; -1 where it has none.

    Stands in for SGLang's `get_last_loc`, which launches Triton. req_pool_indices, lens: `[bs]`
    """
    return torch.where(lens > 0, req_to_token[req_pool_indices, (lens - 1).clamp(min=0)], -1)
