"""Compiles here, without a GPU, what a server would compile at its first start on one: minutes there, once, here.

FlashInfer looks for such modules in a folder of its package; for SGLang's kernels the bundle's loader looks (`bundle`).
For Hopper, bfloat16, and the heads of SmolLM2 and Qwen3. What is missing there is compiled there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ARCHITECTURE = (9, 0, "a")
HEAD_DIMS = (64, 128)
KV_ROW_BYTES = (384, 2048)


def prebuild(out: Path) -> None:
    """Write `kernels.tar.xz`, its paths as the bundle's folder has them. Compiles in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        major, minor, suffix = ARCHITECTURE
        cuda = Path(sysconfig.get_paths()["purelib"], "nvidia/cu13")
        stub = folder / "libcuda.so"  # linked against, and on a machine without a driver not there
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(stub)], check=True)
        (folder / "libcudart.so").symlink_to(next((cuda / "lib").glob("libcudart.so.*")))
        environment = {
            **os.environ,
            "FLASHINFER_WORKSPACE_BASE": name,
            "FLASHINFER_CUDA_ARCH_LIST": f"{major}.{minor}{suffix}",
            "SGLANG_JIT_CACHE_DIR": str(folder / "jit"),
            "LIBRARY_PATH": name,
            "CPATH": str(cuda / "include"),  # cuRAND's and cuBLAS's headers, where the toolkit comes without
        }
        subprocess.run([sys.executable, "-m", "bench.gpu.prebuild"], check=True, env=environment)
        with tarfile.open(out, "w:xz") as tar:
            for library in sorted(folder.rglob("*.so")):
                place = library.relative_to(folder)
                if place.parts[0] != "jit":
                    place = Path("site/flashinfer/data/aot", library.stem, library.name)
                if library.parent != folder:
                    tar.add(library, str(place))


def compile_all() -> None:
    import torch
    from flashinfer.jit.attention.modules import _gen_batch_prefill_primary_module, gen_batch_decode_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.quantization import gen_quantization_module
    from flashinfer.jit.sampling import gen_sampling_module

    half, index = torch.bfloat16, torch.int32
    modules = [gen() for gen in (gen_norm_module, gen_sampling_module, gen_quantization_module, gen_cascade_module)]
    modules.append(gen_page_module())
    for dim in HEAD_DIMS:
        kinds = (half, half, half, index, dim, dim, 0, False, False)
        modules += [_gen_batch_prefill_primary_module("fa2", *kinds, False), gen_batch_decode_module(*kinds)]
    for module in modules:
        print(f"FlashInfer: {module.name}", flush=True)
        module.build()

    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch
    from sglang.kernels.ops.activation.activation import activation_module
    from sglang.kernels.ops.attention.rope import _jit_fused_rope_module
    from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache
    from sglang.kernels.ops.layernorm.norm import _jit_qknorm_module

    with override_jit_cuda_arch(*ARCHITECTURE):
        print("SGLang's kernels", flush=True)
        activation_module(half)
        for row in KV_ROW_BYTES:
            can_use_store_cache(row, row)
        for dim in HEAD_DIMS:
            _jit_fused_rope_module(True, dim, half, half)
            _jit_qknorm_module(dim, half)


if __name__ == "__main__":
    compile_all()
