"""`dspark-sgl bench load`: real servers under real load, arm beside arm.

Every arm is driven by SGLang's own client, with so many users at once, or with requests that arrive at random times;
answers are half to one and a half times --max-new-tokens long. Arms take turns at every load, so that a slow minute of
the machine hits all; figures are medians over the passes, with the least and the most of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .frontier import MEANING, compare
from .launch import (
    STDOUT,
    add_json_argument,
    add_server_arguments,
    check_output,
    demo_target,
    is_here,
    positive,
    write_json,
)
from .load_arms import Arm, ArmServers, check_machine, parse_arms
from .load_client import Load, Served, by_load, serve, write_dataset
from .policies.errors import PolicyError
from .prompts import read_prompts

HELP = "throughput, speed and depth of several arms under load"
DESCRIPTION = """Throughput, speed and depth of several arms, each a real server under real load. SGLang's own client
drives them, with so many users at once or with requests that arrive at random times; answers are half to one and a half
times --max-new-tokens long. Arms take turns at every load; figures are medians over the passes."""
EPILOG = """On a GPU all arms' servers share the card: pass `-- --mem-fraction-static 0.9 --max-total-tokens 50000`, or
run one arm at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--prompts", type=Path, required=True, metavar="F.jsonl", help='lines with "prompt"')
    parser.add_argument(
        "--arms",
        default="plain,fixed-3,fixed-7,adaptive",
        metavar="A,..",
        help="plain; a policy's name or file, under --algorithm; ALGORITHM:POLICY; mtp1, which is MTP_SGL:fixed-1; or "
        "sglang:ALGORITHM, SGLang's own, for instance sglang:DSPARK, on a GPU (default: %(default)s)",
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", default="1,4,8,16", metavar="N,..", help="users at once (default: %(default)s)")
    load.add_argument("--rate", metavar="R,..", help="requests per second, arriving at random, instead")
    parser.add_argument("--per-user", type=positive, default=2, metavar="N", help="questions (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="with --rate (default: %(default)s)")
    parser.add_argument("--passes", type=positive, default=3, metavar="N", help="default: %(default)s")
    add_json_argument(parser)
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a report with pictures, one file")
    parser.set_defaults(act=run)


@dataclass(frozen=True)
class Point:
    """One arm under one load, over all passes."""

    arm: str
    load: Load
    passes: tuple[Served, ...]

    def median(self, figure: Callable[[Served], float]) -> float:
        return statistics.median(figure(served) for served in self.passes)

    def spread(self, figure: Callable[[Served], float]) -> tuple[float, float]:
        values = [figure(served) for served in self.passes]
        return min(values), max(values)

    @property
    def accepted_length(self) -> float | None:
        known = [served.accepted_length for served in self.passes if served.accepted_length is not None]
        return statistics.median(known) if known else None

    @property
    def survival(self) -> list[float]:
        """Share of rounds that accepted k drafts or more, k = 1, 2, .."""
        rounds: Counter[int] = Counter()
        for served in self.passes:
            rounds.update(served.accepted)
        return [
            sum(n for length, n in rounds.items() if length > k) / rounds.total()
            for k in range(1, max(rounds, default=1))
        ]

    @property
    def reliability(self) -> dict[str, list[float]]:
        """Bins of equal width of predicted survival that hold any draft: mean predicted, share accepted, how many."""
        sums = [
            [sum(column) for column in zip(*(s.reliability.get(name, []) for s in self.passes), strict=True)]
            for name in ("predicted", "happened", "count")
        ]
        filled = [(p / n, h / n, n) for p, h, n in zip(*sums, strict=True) if n]
        return {name: [row[i] for row in filled] for i, name in enumerate(("predicted", "observed", "count"))}

    def entry(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "concurrency": self.load.concurrency,
            "rate": self.load.rate,
            "output_tps": self.median(lambda s: s.output_tps),
            "output_tps_spread": self.spread(lambda s: s.output_tps),
            "tps_per_user": self.median(lambda s: s.tps_per_user),
            "tps_per_user_spread": self.spread(lambda s: s.tps_per_user),
            "depth": self.median(lambda s: s.depth),
            "plain_share": self.median(lambda s: s.plain),
            "accepted_length": self.accepted_length,
            "survival": self.survival,
            "reliability": self.reliability,
            "ttft_ms": self._percentiles(lambda s: s.ttft_ms),
            "itl_ms": self._percentiles(lambda s: s.itl_ms),
        }

    def _percentiles(self, of: Callable[[Served], tuple[float, float, float]]) -> dict[str, float]:
        return {name: statistics.median(of(s)[i] for s in self.passes) for i, name in enumerate(("p50", "p90", "p99"))}


def run(options: argparse.Namespace) -> int:
    for option in ("json", "html"):
        check_output(f"--{option}", getattr(options, option))
    if options.html:
        from .load_report import check

        check()
    model = options.model or demo_target()
    is_here("--model", model)
    loads = _loads(options)
    prompts = read_prompts(options.prompts, options.limit)
    arms = parse_arms(options.arms, options.algorithm, model, options.draft)
    check_machine(arms)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "prompts.jsonl"
        write_dataset(prompts, options.max_new_tokens, dataset)
        with ArmServers(arms, model, options.sglang) as servers:
            points = _measure(servers, arms, loads, model, dataset, len(prompts), options)
    entries = [point.entry() for point in points]
    report = {"points": entries, "frontier": compare(entries), "run": _facts(options, model, len(prompts))}
    if options.json != STDOUT:
        print("\n".join(table(report)))
    if options.json:
        write_json(options.json, report)
    if options.html:
        from .load_report import page

        options.html.write_text(page(report))
    return 0


def _measure(
    servers: ArmServers,
    arms: Sequence[Arm],
    loads: Sequence[Load],
    model: str,
    dataset: Path,
    prompts: int,
    options: argparse.Namespace,
) -> list[Point]:
    """Every arm under every load, arms in turn."""
    from tqdm import tqdm

    def ask(arm: Arm, load: Load, seed: int) -> Served:
        wanted = options.requests if load.concurrency is None else max(4, options.per_user * load.concurrency)
        return serve(servers.of(arm), model, dataset, load, min(wanted, prompts), seed)

    found: dict[tuple[str, Load], list[Served]] = {(arm.name, load): [] for load in loads for arm in arms}
    with tqdm(total=len(arms) * (1 + options.passes * len(loads)), unit="run") as bar:
        for arm in arms:
            bar.set_description(f"{arm.name}, warming up")
            ask(arm, loads[0], options.passes)  # prompts of no pass
            bar.update()
        for number in range(options.passes):
            for load in loads:
                # Whoever goes first finds the machine as another load has left it.
                for arm in [*arms[number % len(arms) :], *arms[: number % len(arms)]]:
                    bar.set_description(f"{arm.name}, {load.label}")
                    found[arm.name, load].append(ask(arm, load, number))
                    bar.update()
    return [Point(name, load, tuple(passes)) for (name, load), passes in found.items()]


def _loads(options: argparse.Namespace) -> list[Load]:
    words = (options.rate or options.concurrency).split(",")
    try:
        loads = [Load(rate=float(word)) if options.rate else Load(concurrency=int(word)) for word in words]
    except ValueError:
        loads = []
    if not loads or any((load.rate or load.concurrency or 0) <= 0 for load in loads):
        option = "--rate" if options.rate else "--concurrency"
        raise PolicyError(option, 0, 0, "must be numbers above 0 with commas between them, as 1,4,16")
    return loads


def _facts(options: argparse.Namespace, model: str, prompts: int) -> dict[str, Any]:
    return {
        "model": Path(model).name,
        "draft": options.draft,
        "prompts": {"file": options.prompts.name, "count": prompts},
        "max_new_tokens": options.max_new_tokens,
        "passes": options.passes,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("dspark-sgl", "sglang", "torch")},
        "sglang": options.sglang,
    }


# -- In words ----------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> list[str]:
    """A block of lines per load, an arm a line; its throughput also over that of plain decoding, where that ran."""
    points = report["points"]
    width = max(len(point["arm"]) for point in points)
    head = (
        f"{'':{width}} {'tokens/s':>9} {'':>17} {'plain':>6} {'a user':>8} {'depth':>6} {'plain steps':>11} "
        f"{'length':>7} {'TTFT p50':>9} {'p99 ms':>7} {'ITL p50':>8} {'p99 ms':>7}"
    )
    lines: list[str] = []
    for label, mine in by_load(points):
        plain = next((point["output_tps"] for point in mine if point["arm"] == "plain"), None)
        lines += [label, head]
        for point in mine:
            least, most = point["output_tps_spread"]
            ratio = "-" if plain is None else f"{point['output_tps'] / plain:.2f}"
            length = "-" if point["accepted_length"] is None else f"{point['accepted_length']:.2f}"
            lines.append(
                f"{point['arm']:{width}} {point['output_tps']:9.1f} {f'({least:.1f} to {most:.1f})':>17} {ratio:>6} "
                f"{point['tps_per_user']:8.1f} {point['depth']:6.2f} {point['plain_share']:11.0%} {length:>7} "
                f"{point['ttft_ms']['p50']:9.0f} {point['ttft_ms']['p99']:7.0f} "
                f"{point['itl_ms']['p50']:8.1f} {point['itl_ms']['p99']:7.1f}"
            )
        lines.append("")
    return [*lines, *_frontiers(report, width)]


def _frontiers(report: dict[str, Any], width: int) -> list[str]:
    """What `frontier.compare` says, an arm a line; nothing of a single arm."""
    first, *others = report["frontier"]
    if not others:
        return []
    labels = [label for label, _ in by_load(report["points"])]
    lines = [MEANING.format(first=first), f"{'':{width}} {'area':>9} " + " ".join(f"{label:>14}" for label in labels)]
    for arm in others:
        told = report["frontier"][arm]
        matched = " ".join(f"{'-' if ratio is None else f'{ratio:.2f}':>14}" for ratio in told["matched"])
        lines.append(f"{arm:{width}} {told['area']:9.2f} {matched}")
    return lines
