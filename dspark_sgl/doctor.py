"""`dspark-sgl doctor`: what a server would find on this machine, one line each, and what to do about what is not right.

Looks and reports; it never changes, downloads or starts anything. Exit code 1 means that serving cannot work.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import compat
from .drafts import CHECKPOINTS, DraftConfig, DraftError, check_draft, find_draft, known_drafts, read_any_draft
from .launch import check_algorithm, is_here
from .policies.errors import PolicyError
from .policies.shipped import find_policy
from .settings import policy_name
from .source_index import find
from .unserved import refuse_target

HELP = "check this machine: what serving needs, what is missing, how to fix it"

_OUR_PLUGIN = "dspark_sgl"
_ENTRY_POINTS = {"sglang.srt.plugins": _OUR_PLUGIN, "sglang.srt.platforms": "dspark_cpu"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fatal`: serving cannot work while this is so."""

    name: str
    state: str  # ok | missing | broken | unknown, which a server will find out
    detail: str
    remedy: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.state:8} {self.name:12} {self.detail}{'; ' + self.remedy if self.remedy else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", "--model", metavar="T", help="the target, to see whether a draft fits it")
    parser.add_argument("--draft", metavar="DIR", help="the draft (default: the one shipped or cached for the target)")
    parser.add_argument("--algorithm", default="DSPARK_SGL", help="whose draft it is (default: %(default)s)")
    parser.add_argument("--policy", metavar="NAME|FILE", help="the policy (default: the one a server would take)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(options: argparse.Namespace) -> int:
    findings = list(examine(options.model_path, options.draft, options.algorithm, options.policy))
    healthy = not any(finding.fatal for finding in findings)
    if options.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(finding)
    return 0 if healthy else 1


def examine(model: str | None, draft: str | None, algorithm: str, policy: str | None) -> Iterator[Finding]:
    """All findings, in the order in which a server would stumble over them."""
    yield _sglang()
    yield _surface()
    torch, finding = _torch()
    yield finding
    on_gpu = bool(torch and torch.cuda.is_available())
    yield _device(torch, on_gpu)
    yield _nvml(on_gpu)
    yield _library("FlashInfer", "flashinfer-python", "attention on a GPU", needed=on_gpu)
    yield _library("Triton", "triton", "kernels on a GPU", needed=on_gpu)
    yield from _plugins(on_gpu)
    yield _policy(policy or policy_name())
    yield _draft(model, draft, algorithm, on_gpu)


def _sglang() -> Finding:
    have = compat.installed()
    if have is None:
        return Finding("SGLang", "missing", "not installed", f"pip install sglang=={compat.TESTED}", fatal=True)
    note = "the tested version" if have == compat.TESTED else f"not the tested {compat.TESTED}"
    return Finding("SGLang", "ok", f"{have}, {note}")


def _surface() -> Finding:
    problems = compat.check()
    if not problems:
        return Finding("surface", "ok", f"all {len(compat.SURFACE)} names that we use are there")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding("surface", "broken", problems[0] + more, f"pip install sglang=={compat.TESTED}", fatal=True)


def _torch() -> tuple[Any, Finding]:
    try:
        import torch
    except ImportError as error:
        state = "broken" if find_spec("torch") else "missing"
        return None, Finding("torch", state, _one_line(error), "pip install torch", fatal=True)
    return torch, Finding("torch", "ok", torch.__version__)


def _device(torch: Any, on_gpu: bool) -> Finding:
    if on_gpu:
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("device", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        detail = "no GPU, and SGLANG_USE_CPU_ENGINE asks for kernels that SGLang's wheel lacks"
        return Finding("device", "broken", detail, "unset SGLANG_USE_CPU_ENGINE", fatal=True)
    detail = f"CPU, {os.cpu_count()} cores ({platform.machine()}); no GPU"
    return Finding("device", "ok", f"{detail}; bfloat16 {_half_products(torch)}" if torch else detail)


def _half_products(torch: Any) -> str:
    from dspark_sgl.kernels.linear import FORMS, Blocked

    form = FORMS.get(torch.bfloat16)
    if form is None:
        return "is slow here: serve with --dtype float32"
    return "in hardware" if form is Blocked else "widened"


def _nvml(on_gpu: bool) -> Finding:
    remedy = "install the NVIDIA driver for signals such as gpu.temp_c" if on_gpu else ""
    try:
        import pynvml
    except ImportError:
        return Finding("NVML", "missing", "nvidia-ml-py is not installed", "pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return Finding("NVML", "missing", f"{_one_line(error)}: no GPU signals for policies", remedy)
    return Finding("NVML", "ok", f"driver {driver}")


def _library(name: str, distribution: str, use: str, needed: bool) -> Finding:
    try:
        return Finding(name, "ok", version(distribution) + ("" if needed else f", not used here ({use})"))
    except PackageNotFoundError:
        remedy = f"pip install {distribution}" if needed else ""
        return Finding(name, "missing", use if needed else f"not needed here ({use})", remedy, fatal=needed)


def _plugins(on_gpu: bool) -> Iterator[Finding]:
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()}
    for group, name in _ENTRY_POINTS.items():
        label = group.rpartition(".")[2].removesuffix("s")
        fatal = name == _OUR_PLUGIN or not on_gpu  # a GPU has a platform of SGLang's own
        found = next((point for point in entry_points(group=group) if point.name == name), None)
        if found is None:
            detail = f"SGLang would not find us: no entry point {name} in {group}"
            yield Finding(label, "missing", detail, "pip install this package (-e . in a checkout)", fatal=fatal)
        elif allowed and name not in allowed:
            yield Finding(label, "broken", f"SGLANG_PLUGINS leaves {name} out", f"add {name} to it", fatal=fatal)
        elif find(found.value.replace(":", ".")) is None:  # looked up, not loaded: that would import SGLang
            yield Finding(label, "broken", f"{found.value} is not there", "reinstall this package", fatal=fatal)
        else:
            yield Finding(label, "ok", found.value)
    drafters = entry_points(group="dspark_sgl.spec_algos")
    yield Finding("drafters", "ok", ", ".join(f"{d.name} ({d.value})" for d in drafters) or "none installed")


def _policy(name: str) -> Finding:
    try:
        policy = find_policy(name)
    except PolicyError as error:
        return Finding("policy", "broken", str(error), fatal=True)
    return Finding("policy", "ok", f"{policy.name}: {policy.description}" if policy.description else policy.name)


def _draft(model: str | None, draft: str | None, algorithm: str, on_gpu: bool) -> Finding:
    try:
        drafter = check_algorithm(algorithm)
        for option, checkpoint in (("--model-path", model), ("--draft", draft)):
            if checkpoint and not is_here(option, checkpoint):
                return Finding("draft", "unknown", f"{checkpoint} is not here; checked when a server has downloaded it")
        if model is None:
            return _draft_alone(draft)
        refuse_target(Path(model), algorithm, on_gpu)
        folder = Path(draft) if draft else find_draft(model, algorithm)
        if folder is not None:
            check_draft(folder, model, algorithm)
            return Finding("draft", "ok", f"{folder}, fits {model}")
        if drafter.name not in CHECKPOINTS and not drafter.load().uses_target_hidden:
            return Finding("draft", "ok", f"{algorithm} needs none")
        detail = f"none shipped or cached for {algorithm} with {model}"
        remedy = "name one with --draft, or train one (recipes/README.md in the source checkout)"
        return Finding("draft", "missing", detail, remedy, fatal=True)
    except (DraftError, PolicyError) as error:
        return Finding("draft", "broken", str(error), fatal=True)


def _draft_alone(draft: str | None) -> Finding:
    if draft is not None:
        config = read_any_draft(Path(draft))
        block = f", block of {config.gamma}" if isinstance(config, DraftConfig) else ""
        return Finding("draft", "ok", f"{draft}: {config.algorithm}{block}; no target to check")
    names = ", ".join(folder.name for folder in known_drafts())
    return Finding("draft", "ok", f"shipped or cached: {names or 'none'}; --model-path says which one fits")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
