"""Seeded draws on a CPU: SGLang's own hash, run by Triton's interpreter, and the distribution that is drawn from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from dspark_sgl.cpu_seeds import hashed, multinomial_with_seed

ROWS, COLUMNS = 5, 1500
SGLANGS = f"""
import sys, torch
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel

given = torch.load(sys.argv[1])
seed, positions = given["seed"], given["positions"]
out = torch.empty(({ROWS}, {COLUMNS}), dtype=torch.uint32)
columns = torch.arange({COLUMNS})
murmur_hash32_kernel[({ROWS}, 2)](seed.to(torch.uint64), positions, columns, out, {ROWS}, {COLUMNS}, BLOCK_SIZE=1024)
torch.save(out.to(torch.int64), sys.argv[2])
"""


def test_the_hash_is_sglangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (ROWS,), generator=g)
    seed[:2] = torch.tensor([42, -1])
    positions = torch.tensor([0, 1, 77, 4095, 2**31 - 1])
    torch.save({"seed": seed, "positions": positions}, tmp_path / "given.pt")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    subprocess.run([sys.executable, "-c", SGLANGS, str(tmp_path / "given.pt"), str(tmp_path / "hashed.pt")], check=True)
    assert torch.equal(hashed(seed, positions, COLUMNS), torch.load(tmp_path / "hashed.pt"))


def test_draws_have_the_distribution_and_depend_on_nothing_else() -> None:
    n = 20_000
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    seed, positions = torch.arange(n) // 100, torch.arange(n) % 100
    drawn = multinomial_with_seed(probs.log().expand(n, -1), seed, positions)
    assert drawn.shape == (n, 1)
    counts = drawn.flatten().bincount(minlength=5)
    assert counts[1] == 0
    assert chisquare(counts[probs > 0], (probs * n)[probs > 0]).pvalue > 1e-3
    some = torch.tensor([5, 700, 19_999])
    again = multinomial_with_seed(probs.log().expand(3, -1) + 7, seed[some], positions[some])
    assert torch.equal(again, drawn[some])
