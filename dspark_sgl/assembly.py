"""Puts the governor of a starting server together: policy, hardware signals, what steps cost, calibration, metrics.

Called once, when every forward of the server can run. Decides nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.runtime_context import get_observability, get_parallel, get_spec

from dspark_sgl.policies.calibration import Calibration
from dspark_sgl.policies.cost import DISTURBED, CostModel, disturbance
from dspark_sgl.policies.hardware import HardwareSampler
from dspark_sgl.spec_algos.protocol import Drafter

from .cache import cache_dir
from .deterministic import deterministic
from .governor import Governor
from .graphs import VerifyGraphs
from .load import LoadMeter
from .metrics import Metrics
from .policy_watch import PolicyWatch
from .profiler import StepProfiler
from .ranks import agree, is_leader
from .recorder import Recorder
from .settings import policy_name, record_file
from .sts_file import find_sts

logger = logging.getLogger(__name__)


def build_governor(
    target: Any, drafter: Drafter, capture: CaptureHiddenMode, block: int, width: int, graphs: VerifyGraphs | None
) -> Governor | None:
    """The governor on rank 0; None on the others, which run the profile's forwards along with it."""
    profiler = StepProfiler(target, drafter, capture, block, width, graphs)
    cost = _measured_cost(_facts(target, drafter, block, graphs), profiler)
    if not is_leader():
        return None
    metrics = Metrics(get_parallel().dp_rank or 0) if get_observability().enable_metrics else None
    watch = PolicyWatch(policy_name(), metrics)
    recorder = Recorder.opened(record_file())
    room = width - 1 if drafter.trees and not deterministic() else 0
    load = LoadMeter(HardwareSampler())
    return Governor(watch, block, room, drafter.whole_chains, cost, _calibration(), load, metrics, recorder)


def _measured_cost(facts: dict[str, object], profiler: StepProfiler) -> CostModel:
    """What steps cost: as measured by an earlier start of the same server, or by this one."""
    file = cost_file(facts)
    cost = _saved_cost(file) if is_leader() and file.is_file() else None
    # All ranks profile or none does: the forwards are collective.
    if agree(torch.tensor([int(cost is not None)], device=profiler.device)).item():
        return cost or CostModel.from_points([])
    cost = CostModel.from_points(profiler.run())
    if is_leader():
        _save_cost(cost, file, facts)
    return cost


def _save_cost(cost: CostModel, file: Path, facts: dict[str, object]) -> None:
    """For servers that start later; a profile that was disturbed is none for them."""
    excess = disturbance(cost.points)
    if excess > DISTURBED:
        logger.warning(
            "dspark: other work was going on while step costs were measured (a smaller step took up to %.0f %% more "
            "than a larger one): the next start measures again",
            100 * excess,
        )
        return
    try:
        cost.save(file, facts)
    except OSError as error:
        logger.warning("dspark: the profile is not kept, and the next start measures again: %s", error)


def _saved_cost(file: Path) -> CostModel | None:
    cost = CostModel.load(file)
    if cost is None or not cost.ready:
        logger.warning("dspark: %s holds no profile that this version reads: measuring again", file)
        return None
    return cost


def cost_file(facts: dict[str, object]) -> Path:
    """Where the profile of a server with these facts is kept."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir("costs") / f"{digest}.json"


def _facts(target: Any, drafter: Drafter, block: int, graphs: VerifyGraphs | None) -> dict[str, object]:
    """Everything that a step's cost depends on."""
    device = torch.device(target.device)
    on_cpu = device.type == "cpu"
    return {
        "device": platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "model": target.model_config.model_path,
        "dtype": str(target.dtype),
        "algorithm": drafter.algorithm,
        "draft": get_spec().speculative_draft_model_path,
        "block": block,
        "tp": get_parallel().tp_size,
        "attention": type(target.attn_backend).__name__,
        "deterministic": deterministic(),
        "graphs": [] if graphs is None else graphs.widths,
        "quantization": target.model_config.quantization,
        "kv_dtype": str(target.kv_cache_dtype),
        "page_size": target.page_size,
        "sglang": version("sglang"),
        "dspark-sgl": version("dspark-sgl"),
    }


def _calibration() -> Calibration:
    """The draft's own temperatures, where it brings some or `dspark-sgl calibrate` has fitted some here."""
    draft = get_spec().speculative_draft_model_path  # the record of arguments has only what a user named
    file = find_sts(Path(draft)) if draft else None
    if file is None:
        return Calibration()
    logger.info("dspark: confidence is calibrated by %s", file)
    return Calibration.from_json(file)
