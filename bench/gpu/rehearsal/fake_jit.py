"""SGLang's kernels that nvcc would compile at first use, in torch. One that is not here fails by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fake_graphs
from torch import Tensor


def _store_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, size_limit: int, skipped: int
) -> None:
    """Two rows for one slot would come in any order on a GPU, so they are an error here."""
    if int(indices.min()) < 0 or int(indices.max()) >= size_limit:
        raise RuntimeError(f"KV slots {indices.tolist()} of {size_limit}")
    written = indices != skipped
    slots = indices[written]
    if len(slots.unique()) < len(slots):
        raise RuntimeError(f"KV slots written twice: {indices.tolist()}")
    k_cache[slots] = k[written]
    v_cache[slots] = v[written]


def _qknorm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    for heads, weight in ((q, q_weight), (k, k_weight)):
        wide = heads.float()
        heads.copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float())


KERNELS: dict[str, Callable[..., Any]] = {"kvcache.store_cache": _store_cache, "qknorm.qknorm": _qknorm}


class _Module:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, function: str) -> Callable[..., Any]:
        name = f"{self._name}.{function}"

        def lacking(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"the rehearsal lacks SGLang's {name}")

        kernel = KERNELS.get(name, lacking)
        return lambda *args, **kwargs: fake_graphs.launch(kernel, *args, **kwargs)


def load_jit(*args: str, **_: Any) -> _Module:
    return _Module(args[0])
