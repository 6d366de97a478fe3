"""Products of few rows: `kernels.linear` against torch's own, on the target's shapes, arms in alternation.

    python -m bench.linear [--dtype bfloat16] [--rows 1,2,4,8,16,64,256] [--passes 5]

Each shape has enough weights to leave no cache warm, as the layers of a model have. Milliseconds a product, medians;
the form in which `kernels.linear` keeps weights here is printed first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from dspark_sgl.kernels.linear import FORMS, keep_packed, linear

SHAPES = {"gate and up": (3072, 576), "down": (576, 1536), "vocabulary": (49152, 576)}
BYTES = 100e6
"""Of weights per shape: more than a cache holds."""


def milliseconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return 1e3 * (time.perf_counter() - start) / len(weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="default: %(default)s"
    )
    parser.add_argument(
        "--rows", default="1,2,4,8,16,64,256", metavar="N,..", help="of a product (default: %(default)s)"
    )
    parser.add_argument("--passes", type=int, default=5, help="of both arms (default: %(default)s)")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    form = f"packed: {FORMS[dtype].__name__.lower()}" if dtype in FORMS else "torch's own"
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; {form}")
    print(f"{'':14}{'rows':>6}{'torch':>10}{'ours':>10}{'faster':>9}")
    for name, (n, k) in SHAPES.items():
        count = max(1, round(BYTES / (n * k * dtype.itemsize)))
        weights = [torch.randn(n, k).to(dtype) for _ in range(count)]
        packed = [keep_packed(weight.clone()) for weight in weights]
        for rows in map(int, options.rows.split(",")):
            x = torch.randn(rows, k).to(dtype)
            milliseconds(torch_linear, x, weights), milliseconds(linear, x, packed)  # warm
            found = [
                (milliseconds(torch_linear, x, weights), milliseconds(linear, x, packed)) for _ in range(options.passes)
            ]
            theirs, ours = (median(column) for column in zip(*found, strict=True))
            print(f"{name:14}{rows:6}{theirs:10.3f}{ours:10.3f}{theirs / ours:8.1f}x", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
