"""Runs everything in this folder and writes it down, newest first.

    python -m bench.gpu.report [--out docs/gpu.md] [--bundle build/gpu] [--small]

`--bundle`: the parts that `bench/gpu/pack` wrote; with them, FlashInfer's masks are checked and servers are measured.
`--small` is for a machine without a GPU: the same code on small sizes in Triton's interpreter, printed and not written.
Exits 1 when a check fails; what failed is written too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

from dspark_sgl.ending import unwind_when_told_to_end

from .bundle import Bundle
from .servers import GpuServers, Target
from .serving import known, measure_serving, phase_table, serving_table, smollm2

TESTS = ("tests/test_kernels_triton.py", "tests/test_kernels_nan.py", "tests/test_draft_graph.py")
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang")
HEAD = """# On GPUs

What `bench/gpu/run` has measured, newest first. Times are medians. The floor of a kernel is the time that the bytes it
must read and write take at the bandwidth of a copy on the same card. What a section does not mention has not run on its
card.
"""
SECTION = re.compile(r"^## \d{4}-", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gpu.md"), help="the page (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, metavar="PARTS", help="the folder that bench/gpu/pack has filled")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"), help="where servers' logs go (default: /tmp)")
    parser.add_argument("--no-timings", action="store_false", dest="timings", help="leave out the kernels' times")
    parser.add_argument("--small", action="store_true", help="without a GPU, and without writing the page")
    options = parser.parse_args()
    unwind_when_told_to_end()
    if options.small:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from .timings import measure

    bundle = Bundle.unpacked(options.bundle) if options.bundle else None
    lines = [f"## {date.today().isoformat()}, {device()}", "", versions(bundle), ""]
    passed = []

    def found(*new: str) -> None:
        say("\n".join(new))
        lines.extend((*new, ""))

    started: list[GpuServers] = []

    def start(target: Target) -> GpuServers:
        assert bundle is not None
        started.append(GpuServers(target, bundle.environment, options.logs, 32000 + 1000 * len(started)))
        return started[-1]

    try:
        if bundle is not None:
            # They import for a minute, in which the GPU has time for the tests.
            start(known(bundle.site.parent / "qwen3-8b-in-size"))
        for what, (good, said) in (
            ("Kernels against references", kernel_tests(options.small)),
            ("FlashInfer's attention under our masks", mask_check(options.small, bundle)),
        ):
            passed.append(good)
            found(f"{what}: {said}.")
        if bundle is not None:
            found(*served(started[0]))
            found(*served(start(smollm2(bundle))))
        if options.timings:
            found(*table(measure(options.small)))
    finally:
        for servers in started:
            servers.stop()
    section = "\n".join(lines)
    print(section)
    if not options.small:
        options.out.write_text(with_section(options.out.read_text() if options.out.exists() else HEAD, section))
    return 0 if all(passed) else 1


def with_section(page: str, section: str) -> str:
    """The page with one more dated section: before the others, after what introduces them."""
    newest = SECTION.search(page)
    at = newest.start() if newest else len(page)
    return "\n\n".join(part.strip("\n") for part in (page[:at], section, page[at:]) if part.strip()) + "\n"


def served(servers: GpuServers) -> list[str]:
    """What servers that have been started serve, as Markdown; they are ended."""
    servers.wait(150)
    say(f"ready: {', '.join(servers.ready)}")
    points = measure_serving(servers, 45)
    servers.stop()
    lines = serving_table(servers.target.title, points)
    return [*lines, "", *phase_table(points), *(f"- {line}" for line in servers.failures())]


def say(text: str) -> None:
    """As soon as it is known: the machine may be taken away before the end."""
    print(text, file=sys.stderr, flush=True)


def mask_check(small: bool, bundle: Bundle | None) -> tuple[bool, str]:
    """In a process of its own, whose FlashInfer may be the bundle's."""
    if small:
        return True, "not run, no GPU"
    environment = dict(os.environ) if bundle is None else bundle.environment
    command = [sys.executable, "-m", "bench.gpu.masks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode == 0, (done.stdout.strip() or done.stderr.strip()[-300:])


def kernel_tests(small: bool) -> tuple[bool, str]:
    """The same tests that run in Triton's interpreter elsewhere; small: one of them."""
    chosen = ["-k", "empty_residual"] if small else []
    chosen += ["-n", "10"] if not small and find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *chosen]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    said = last.strip("= ") + (": " + ", ".join(failed[:10]) if failed else "")
    return done.returncode == 0, said


def device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    facts = torch.cuda.get_device_properties(0)
    return f"{facts.name} ({facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors)"


def versions(bundle: Bundle | None) -> str:
    """Of what has run: the machine's own distributions, and those that came along."""
    found = []
    for name in PACKAGES:
        brought = [] if bundle is None else list(distributions(name=name, path=[str(bundle.site)]))
        if brought:
            found.append(f"{name} {brought[0].version} (of the bundle)")
            continue
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown, the first column to the left."""
    head = ("operation", "size", "torch, us", "Triton, us", "floor, us", "over the floor")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
