"""Compiles every Triton kernel to machine code for two generations of GPUs; needs none. Run by test_kernels_triton."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark_sgl.kernels import (
    mask_triton,
    rejection_triton,
    sequential_head_triton,
    tree_children_triton,
    tree_rejection_triton,
    walk_triton,
)

POINTERS = {
    **dict.fromkeys(("path", "lengths", "bonus", "tokens", "parents", "nodes", "place"), "*i64"),
    **dict.fromkeys(("starts", "row_starts", "column"), "*i32"),
    **dict.fromkeys(("weights", "target", "draft", "token_probs", "tries", "q", "most", "mass"), "*fp32"),
    **dict.fromkeys(("total", "temperature", "warm", "chance"), "*fp32"),
    **dict.fromkeys(("owner", "likeliest", "drawn"), "*i64"),
    "coins": "*fp64",
    "greedy": "*i1",
}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (walk_triton._walk, {"out": "*i64", "target": "*i64"}, {"ROWS": 16}),
    (mask_triton._mask, {"out": "*u8", "starts": "*i64", "prefix_lens": "*i64"}, {"BITS": 1, "BYTES": 2048}),
    (mask_triton._mask, {"out": "*u8", "prefix_lens": "*i32"}, {"BITS": 8, "BYTES": 256}),
    (rejection_triton._draw, {"out": "*i64"}, {"TILE": 2048}),
    (rejection_triton._chain, {}, {"HOT": True, "ROWS": 8, "TILE": 2048}),
    (
        sequential_head_triton._score,
        {"where": "*i32", "base": "*bf16", "latent": "*bf16", "w2": "*bf16"},
        {"DRAWN": True, "RANK": 256, "ROWS": 16, "TILE": 128},
    ),
    (
        sequential_head_triton._score,
        {"base": "*fp32", "latent": "*fp32", "w2": "*fp32", "where": "*i32"},
        {"DRAWN": False, "RANK": 16, "ROWS": 16, "TILE": 128, "q": None, "temperature": None},
    ),
    (
        sequential_head_triton._choose,
        {"column": "*i64", "where": "*i32"},
        {"DRAWN": True, "TILES": 2048, "TILE": 128},
    ),
    (sequential_head_triton._spread, {}, {"TILE": sequential_head_triton.SPREAD}),
    (
        tree_children_triton._score,
        {"base": "*bf16", "latent": "*bf16", "w2": "*bf16"},
        {"DRAWN": True, "HEAD": True, "RANK": 256, "ROWS": 16, "TILE": 128},
    ),
    (
        tree_children_triton._score,
        {"base": "*fp32"},
        {"DRAWN": False, "HEAD": False, "RANK": 16, "ROWS": 16, "TILE": 128}
        | dict.fromkeys(("q", "warm", "latent", "w2", "temperature")),
    ),
    (
        tree_children_triton._lead,
        {"base": "*bf16", "latent": "*bf16", "w2": "*bf16"},
        {"HEAD": True, "BRANCH": 4, "PLACES": 4, "RANK": 256, "AT_ONCE": 16, "TILES": 2048, "TILE": 128},
    ),
    (
        tree_children_triton._lead,
        {"base": "*fp32"},
        {"HEAD": False, "BRANCH": 16, "PLACES": 16, "RANK": 16, "AT_ONCE": 4, "TILES": 256, "TILE": 128}
        | dict.fromkeys(("latent", "w2")),
    ),
    (tree_children_triton._draw, {}, {"BRANCH": 4, "PLACES": 4, "TILES": 2048, "TILE": 128}),
    (tree_rejection_triton._tree, {}, {"HOT": True, "ROWS": 64, "TILE": 2048}),
    (tree_rejection_triton._tree, {"column": "constexpr"}, {"HOT": False, "ROWS": 2, "TILE": 64, "column": None}),
    (rejection_triton._chain, {"column": "constexpr"}, {"HOT": False, "ROWS": 1, "TILE": 64, "column": None}),
]

for kernel, own, constants in KERNELS:
    types = {name: {**POINTERS, **own}.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
