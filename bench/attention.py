"""Attention on a CPU, one layer: our backend against SGLang's `torch_native`, arms in alternation.

    python -m bench.attention [--passes 30] [--threads N] [--dtype bfloat16] [--json OUT]

A forward is prepared once and then run through LAYERS layers, as in a model. `torch_native` has no verify mode; its
nearest equivalent is an extend of the same rows behind the same prefix, which gives the same numbers for a chain.
Time is the CPU time of the calling thread with one thread (other work on the machine does not count), the wall
otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dspark_sgl.cpu_attention import CpuAttentionBackend

LAYERS = 24
POOLS = 6  # enough that keys come from memory: no layer finds what the one before it read


@dataclass(frozen=True)
class Shape:
    """Heads of a model: q heads, kv heads, head dim."""

    name: str
    q_heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True)
class Load:
    """`rows[i]` new rows behind `prefix[i]` tokens. in_place: every request's slots follow one another."""

    name: str
    mode: ForwardMode
    prefix: tuple[int, ...]
    rows: tuple[int, ...]
    in_place: bool = False


@dataclass(frozen=True)
class Line:
    """Microseconds per layer: median, and the lower and upper quartile; ratio: theirs over ours, pair by pair."""

    shape: str
    load: str
    ours: tuple[float, float, float]
    theirs: tuple[float, float, float]
    ratio: float


SHAPES = (Shape("9/3 heads x 64", 9, 3, 64), Shape("16/8 heads x 128", 16, 8, 128))
MIXED = (40, 700, 90, 300, 55, 120, 1000, 64)
LOADS = (
    Load("decode 1 at 128", ForwardMode.DECODE, (128,), (1,)),
    Load("decode 1 at 1000, slots in a row", ForwardMode.DECODE, (1000,), (1,), in_place=True),
    Load("decode 1 at 1000", ForwardMode.DECODE, (1000,), (1,)),
    Load("decode 8 at 300", ForwardMode.DECODE, (300,) * 8, (1,) * 8),
    Load("decode 8, 40 to 1000", ForwardMode.DECODE, MIXED, (1,) * 8),
    Load("decode 32 at 300", ForwardMode.DECODE, (300,) * 32, (1,) * 32),
    Load("prefill 512", ForwardMode.EXTEND, (0,), (512,)),
    Load("prefill 8, 40 to 1000", ForwardMode.EXTEND, (0,) * 8, MIXED),
    Load("extend 256 behind 1000", ForwardMode.EXTEND, (1000,), (256,)),
    Load("extend 8 x 20 behind 40 to 1000", ForwardMode.EXTEND, MIXED, (20,) * 8),
    Load("verify 8 rows behind 128", ForwardMode.TARGET_VERIFY, (128,), (8,)),
    Load("verify 8 rows behind 1000", ForwardMode.TARGET_VERIFY, (1000,), (8,)),
    Load("verify 8 x 6 rows behind 300", ForwardMode.TARGET_VERIFY, (300,) * 8, (6,) * 8),
    Load("verify 8, 1 to 8 rows behind 40 to 1000", ForwardMode.TARGET_VERIFY, MIXED, (1, 2, 3, 4, 5, 6, 7, 8)),
)


def prepare(shape: Shape, load: Load, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], None]]:
    """Ours and theirs, over the same pools and inputs."""
    gen = torch.Generator().manual_seed(0)
    total = sum(load.prefix) + sum(load.rows)
    table = ReqToTokenPool(len(load.rows), 2048, "cpu", False)
    pool = MHATokenToKVPool(total + 1, 1, dtype, shape.kv_heads, shape.dim, POOLS, "cpu", False)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn(buffer.shape, generator=gen))
    slots = (torch.arange(total) if load.in_place else torch.randperm(total, generator=gen)) + 1
    out_loc, at = [], 0
    for i, (prefix, rows) in enumerate(zip(load.prefix, load.rows, strict=True)):
        table.req_to_token[i + 1, : prefix + rows] = slots[at : at + prefix + rows].int()
        out_loc.append(slots[at + prefix : at + prefix + rows])
        at += prefix + rows
    n, prefix, rows = sum(load.rows), torch.tensor(load.prefix), torch.tensor(load.rows)
    common: dict[str, Any] = {
        "batch_size": len(load.rows),
        "req_pool_indices": torch.arange(1, len(load.rows) + 1),
        "out_cache_loc": torch.cat(out_loc),
        "extend_prefix_lens": prefix,
        "extend_seq_lens": rows,
        "encoder_lens": None,
        "spec_info": SimpleNamespace(qo_lens=list(load.rows), tree_mask=None),
    }
    verify = load.mode.is_target_verify()
    mine = SimpleNamespace(forward_mode=load.mode, seq_lens=prefix if verify else prefix + rows, **common)
    nearest = ForwardMode.EXTEND if verify else load.mode
    other = SimpleNamespace(forward_mode=nearest, seq_lens=prefix + rows, **common)
    runner = SimpleNamespace(req_to_token_pool=table, token_to_kv_pool=pool, device="cpu")
    layers = [RadixAttention(shape.q_heads, shape.dim, shape.dim**-0.5, shape.kv_heads, i) for i in range(POOLS)]
    q = torch.randn(n, shape.q_heads * shape.dim, generator=gen).to(dtype)
    k, v = (torch.randn(n, shape.kv_heads, shape.dim, generator=gen).to(dtype) for _ in range(2))

    def arm(backend: Any, batch: Any) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            backend.init_forward_metadata(batch)
            for layer in layers * (LAYERS // POOLS):
                out = backend.forward(q, k, v, layer, batch)
            return out

        return run

    ours, theirs = arm(CpuAttentionBackend(runner), mine), arm(TorchNativeAttnBackend(runner), other)
    difference = float((ours().float() - theirs().float()).abs().max())
    assert difference < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{load.name}: the arms differ by {difference}"
    return ours, theirs


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def measure(shape: Shape, load: Load, dtype: torch.dtype, passes: int) -> Line:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    arms = prepare(shape, load, dtype)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(passes):
        for which in (0, 1) if i % 2 else (1, 0):
            start = clock()
            arms[which]()
            times[which].append((clock() - start) / LAYERS * 1e6)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return Line(shape.name, load.name, quartiles(times[0]), quartiles(times[1]), ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=30, help="of both arms (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument("--only", default="", help="loads whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.dtype}, {args.threads} threads, microseconds per layer: median (quartiles)")
    print(f"{'':18}{'':42}{'ours':>26}{'torch_native':>26}{'ratio':>9}")
    lines = []
    with torch.inference_mode():
        for shape in SHAPES:
            for load in (load for load in LOADS if args.only in load.name):
                line = measure(shape, load, getattr(torch, args.dtype), args.passes)
                lines.append(line)
                ours, theirs = (f"{m:10.0f} ({a:.0f} to {b:.0f})" for m, a, b in (line.ours, line.theirs))
                print(f"{line.shape:18}{line.load:42}{ours:>26}{theirs:>26}{line.ratio:8.2f}x", flush=True)
    slower = [f"{line.shape}, {line.load}" for line in lines if line.ratio < 1]
    print("slower than torch_native: " + ("; ".join(slower) if slower else "nowhere"))
    if args.json:
        args.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()
