"""GPU and processor signals: a thread of its own reads them ten times a second, everybody else takes the last ones.

`latest` never waits: a driver call that hangs or fails makes signals grow old, and what is older than two seconds is
absent. Where there is no GPU, only `cpu.util` is read. Never writes to a device.

Several GPUs become one value: the mean of `gpu.util`; the largest of `gpu.memory_util` and `gpu.temp_c`; the sum of
`gpu.power_w` and `gpu.power_limit_w`; the smallest `gpu.sm_clock_mhz`; `gpu.throttled` when any is.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from .errors import PolicyError

PERIOD_S = 0.1
STALE_S = 2.0

Reading = dict[str, float | bool]
Gpu = Mapping[str, float | bool]

# Field of one GPU -> how several become one. The names are the signals' behind "gpu.".
AGGREGATES: Mapping[str, Callable[[Sequence[float | bool]], float | bool]] = {
    "util": fmean,
    "memory_util": max,
    "power_w": sum,
    "power_limit_w": sum,
    "sm_clock_mhz": min,
    "temp_c": max,
    "throttled": any,
}


class Source(Protocol):
    """Reads the hardware once; may block or raise."""

    def read(self) -> Reading: ...

    def close(self) -> None: ...


def aggregate(gpus: Sequence[Gpu]) -> Reading:
    """Signals of all GPUs together; a field that any of them cannot read is absent."""
    return {
        f"gpu.{field}": fold([gpu[field] for gpu in gpus])
        for field, fold in AGGREGATES.items()
        if gpus and all(field in gpu for gpu in gpus)
    }


class HardwareSampler:
    """Reads `source` (this machine's GPUs, else its processor) in a daemon thread until `close`."""

    def __init__(self, source: Source | None = None, period_s: float = PERIOD_S) -> None:
        self._source = source or this_machine()
        self._period_s = period_s
        self._reading: tuple[float, Reading] = (-STALE_S, {})
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dspark-hardware", daemon=True)
        self._thread.start()

    def latest(self) -> Reading:
        """The last values, none of them older than two seconds."""
        at, reading = self._reading
        return dict(reading) if time.monotonic() - at < STALE_S else {}

    def available(self, timeout_s: float = 1.0) -> frozenset[str]:
        """Which signals this machine has; waits for the first reading, not longer than `timeout_s`."""
        self._first.wait(timeout_s)
        return frozenset(self.latest())

    def close(self) -> None:
        """Ends the thread; one that hangs in a driver is left behind, since it is a daemon."""
        self._stop.set()
        self._thread.join(2 * self._period_s)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s if self._first.is_set() else 0):
            try:
                self._reading = (time.monotonic(), self._source.read())
            except (
                Exception
            ):  # drivers fail in many ways, often for a moment: the last values age until they are absent
                continue
            finally:
                self._first.set()
        self._source.close()


def this_machine() -> Source:
    """NVML where a driver answers, else psutil."""
    try:
        return NvmlSource()
    except Exception:  # no library, no driver, no permission: all of them mean "no GPU signals"
        return ProcessorSource()


class ProcessorSource:
    """`cpu.util` by psutil: the share of time since the reading before."""

    def __init__(self) -> None:
        import psutil

        self._percent: Callable[[], float] = psutil.cpu_percent
        self._percent()  # the first call has nothing to compare with

    def read(self) -> Reading:
        return {"cpu.util": self._percent() / 100}

    def close(self) -> None:
        pass


class NvmlSource:
    """The GPUs that this process may see, by NVML. Fields that a GPU does not know are left out."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpus = [_handle(pynvml, name) for name in visible_gpus(pynvml.nvmlDeviceGetCount())]
        if not self._gpus:
            raise RuntimeError("no visible GPU")

    def read(self) -> Reading:
        return aggregate([self._read_one(gpu) for gpu in self._gpus])

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _read_one(self, gpu: Any) -> dict[str, float | bool]:
        nvml = self._nvml
        # Not SwPowerCap: a busy GPU is at its power limit most of the time, and power has signals of its own.
        slowed = (
            nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        fields: dict[str, Callable[[], float | bool]] = {
            "util": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "memory_util": lambda: _share_used(nvml.nvmlDeviceGetMemoryInfo(gpu)),  # not .memory: that is bandwidth
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
            "sm_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "temp_c": lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            "throttled": lambda: bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & slowed),
        }
        known: dict[str, float | bool] = {}
        for name, read in fields.items():
            try:
                known[name] = read()
            except nvml.NVMLError_NotSupported:
                continue
        return known


class ReplaySource:
    """A recorded trace, one JSON object a line: `{"t": seconds, "gpus": [{"util": 0.9, ...}]}`. Time is the reader's.

    A reading is the last line at or before the seconds that have passed; behind the end, the last line.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._trace = _read_trace(Path(path))
        self._clock = clock
        self._start = clock()

    def read(self) -> Reading:
        passed = self._clock() - self._start
        due = [reading for at, reading in self._trace if at <= passed]
        return dict(due[-1]) if due else {}

    def close(self) -> None:
        pass


def visible_gpus(count: int) -> list[str]:
    """Indices or UUIDs of the GPUs in CUDA_VISIBLE_DEVICES, all of `count` when it is not set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)


def _share_used(memory: Any) -> float:
    return float(memory.used / memory.total)


def _read_trace(path: Path) -> list[tuple[float, Reading]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise PolicyError(str(path), 0, 0, f"cannot be read: {error.strerror}") from None
    return [_read_line(path, number, line) for number, line in enumerate(lines, 1)]


def _read_line(path: Path, number: int, line: str) -> tuple[float, Reading]:
    try:
        entry = json.loads(line)
        return float(entry["t"]), aggregate(entry["gpus"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = 'not a line of a hardware trace, {"t": seconds, "gpus": [{...}]}'
        raise PolicyError(str(path), number, 1, reason) from None
