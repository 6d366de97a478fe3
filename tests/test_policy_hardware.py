"""Hardware signals: stated aggregation, absence instead of zero, and a reader that no driver can hold up."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from dspark_sgl.policies import SIGNALS, PolicyError, RuleBook, Snapshot, find_policy, hardware
from dspark_sgl.policies.hardware import HardwareSampler, NvmlSource, Reading, ReplaySource, aggregate, visible_gpus

TRACE = Path(__file__).parent / "nvml_trace.jsonl"
GPU = {
    "util": 0.5,
    "memory_util": 0.6,
    "power_w": 200.0,
    "power_limit_w": 300.0,
    "sm_clock_mhz": 1700.0,
    "temp_c": 60.0,
    "throttled": False,
}


class Scripted:
    """A source that does what it is told."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self.read = read
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


def until(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_several_gpus_become_one_value_by_the_stated_rules():
    other = GPU | {"util": 0.7, "memory_util": 0.9, "power_w": 250.0, "sm_clock_mhz": 1200.0, "temp_c": 80.0}
    other["throttled"] = True
    together = aggregate([GPU, other])
    assert together == {
        "gpu.util": 0.6,
        "gpu.memory_util": 0.9,
        "gpu.power_w": 450.0,
        "gpu.power_limit_w": 600.0,
        "gpu.sm_clock_mhz": 1200.0,
        "gpu.temp_c": 80.0,
        "gpu.throttled": True,
    }
    assert set(together) == {name for name in SIGNALS if name.startswith("gpu.")}


@pytest.mark.parametrize(
    ("reason", "throttled"),
    [("SwPowerCap", False), ("GpuIdle", False), ("HwSlowdown", True), ("SwThermalSlowdown", True)],
)
def test_a_gpu_at_its_power_limit_is_not_throttled(reason: str, throttled: bool, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise pynvml.NVMLError_NotSupported

    for name in ("UtilizationRates", "MemoryInfo", "PowerUsage", "EnforcedPowerLimit", "ClockInfo", "Temperature"):
        monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", unknown)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    reasons = getattr(pynvml, f"nvmlClocksThrottleReason{reason}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu: reasons)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert NvmlSource().read() == {"gpu.throttled": throttled}


def test_what_one_gpu_cannot_say_is_absent():
    blind = {field: value for field, value in GPU.items() if field != "power_w"}
    assert "gpu.power_w" not in aggregate([GPU, blind])
    assert "gpu.temp_c" in aggregate([GPU, blind])
    assert aggregate([]) == {}


def test_a_machine_without_a_gpu_has_cpu_util_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "NvmlSource", lambda: 1 / 0)
    sampler = HardwareSampler(period_s=0.02)
    assert sampler.available() == {"cpu.util"}
    assert 0 <= sampler.latest()["cpu.util"] <= 1
    sampler.close()


def test_a_driver_that_hangs_holds_up_nobody_and_its_signals_go_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "STALE_S", 0.2)
    release, hung = threading.Event(), threading.Event()

    def reads() -> Iterator[Reading]:
        yield {"gpu.temp_c": 60.0}
        hung.set()
        release.wait(10)
        yield {"gpu.temp_c": 61.0}

    sampler = HardwareSampler(Scripted(reads().__next__), period_s=0.01)
    assert sampler.available() == {"gpu.temp_c"}
    assert hung.wait(5)
    start = time.perf_counter()
    sampler.latest()
    assert time.perf_counter() - start < 0.05
    assert until(lambda: sampler.latest() == {})
    release.set()
    assert until(lambda: sampler.latest() == {"gpu.temp_c": 61.0})
    sampler.close()


def test_a_driver_that_fails_for_a_moment_is_asked_again():
    answers = iter([{"gpu.temp_c": 60.0}, RuntimeError("lost"), RuntimeError("lost"), {"gpu.temp_c": 62.0}])

    def read() -> Reading:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    source = Scripted(read)
    sampler = HardwareSampler(source, period_s=0.01)
    assert until(lambda: sampler.latest() == {"gpu.temp_c": 62.0})
    sampler.close()
    assert source.closed.wait(5)


def test_a_recorded_trace_drives_the_rules_of_a_policy():
    now = 0.0
    source = ReplaySource(TRACE, clock=lambda: now)
    policy = find_policy("power-capped")
    rules = RuleBook(policy, block=7)
    fired = []
    for step in range(70):
        now = step / 2
        fired.append(rules.batch(Snapshot(source.read() | {"batch.size": 4.0})).rule)
    assert fired[0] is None
    assert fired[30] == 0
    assert fired[-1] is None
    assert rules.missing(source.read().keys() | {"batch.size"}) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"t": 0}', '{"t": "x", "gpus": []}', '{"t": 0, "gpus": 3}'])
def test_a_bad_trace_is_one_located_line(tmp_path: Path, text: str):
    (tmp_path / "t.jsonl").write_text(f'{{"t": 0, "gpus": []}}\n{text}\n')
    with pytest.raises(PolicyError, match=r"t\.jsonl:2:1: not a line of a hardware trace"):
        ReplaySource(tmp_path / "t.jsonl")
    with pytest.raises(PolicyError, match="cannot be read"):
        ReplaySource(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("variable", "gpus"), [(None, ["0", "1"]), ("1", ["1"]), ("", []), ("-1", []), ("GPU-a, 0", ["GPU-a", "0"])]
)
def test_only_visible_gpus_are_read(monkeypatch: pytest.MonkeyPatch, variable: str | None, gpus: list[str]):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus(2) == gpus


def test_nvml_has_every_name_that_is_read_from_it():
    used = set(re.findall(r"nvml\.(\w+)", Path(hardware.__file__).read_text()))
    assert {name for name in used if not hasattr(pynvml, name)} == set()
