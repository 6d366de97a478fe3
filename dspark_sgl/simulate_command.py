"""`dspark-sgl policy simulate`: policies under a made-up or recorded load, on a machine whose costs are known.

Prints throughput, per-user speed and depth per policy and load; draws the frontier and the depth over time. Needs
neither torch nor SGLang; the picture needs matplotlib.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .picture import check_picture, new_figure, save
from .policies.errors import PolicyError
from .policies.language import MAX_DEPTH, Policy
from .policies.shipped import find_policy

if TYPE_CHECKING:  # these import numpy, which the other commands do without
    from .policies.simulator import Machine, Result
    from .policies.workload import Workload

HELP = "simulate policies under a load, on a modelled machine"

TRACE = 'requests, one JSON a line: {"arrival": s, "prompt": tokens, "output": tokens, "acceptance": [..]}'
MOST = {"block": MAX_DEPTH, "requests": 10**7, "max_running": 10**6, "kv_tokens": 10**12}
"""Of whole numbers; the others are tokens of a request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policies", nargs="+", metavar="NAME|FILE")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--users",
        default="1,4,16,64",
        metavar="N,..",
        help="so many at once, who ask again as soon as they are answered (default: %(default)s)",
    )
    load.add_argument("--rate", metavar="R,..", help="requests per second, arriving at random")
    load.add_argument("--trace", type=Path, metavar="FILE.jsonl", help=TRACE)
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="per load (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=500, metavar="N", help="mean (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=200, metavar="N", help="mean (default: %(default)s)")
    parser.add_argument(
        "--acceptance",
        default="0.8",
        metavar="A,..",
        help="of each draft, given the one before; the last repeats (default: %(default)s)",
    )
    parser.add_argument(
        "--side",
        type=float,
        default=0.2,
        metavar="A",
        help="of each further child in trees, given that those before it fail (default: %(default)s)",
    )
    parser.add_argument("--block", type=int, default=7, metavar="N", help="the drafter's depth (default: %(default)s)")
    parser.add_argument(
        "--cost", type=Path, metavar="FILE.json", help="a profile that a server has saved (default: a stated machine)"
    )
    parser.add_argument("--prefill-ms", type=float, metavar="MS", help="of a prefill (default: 4, a large GPU's)")
    parser.add_argument(
        "--prefill-token-us", type=float, metavar="US", help="of each of its tokens (default: 30, a large GPU's)"
    )
    parser.add_argument("--kv-tokens", type=int, default=1_000_000, metavar="N", help="KV slots (default: %(default)s)")
    parser.add_argument("--max-running", type=int, default=256, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths and luck; one seed, one result (default: 0)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the frontier and the depth over time")


@dataclass(frozen=True)
class Point:
    """One policy under one load."""

    policy: str
    load: str
    result: "Result"


def run(options: argparse.Namespace) -> int:
    from .policies.simulator import simulate

    check_picture("--plot", options.plot)
    policies = [find_policy(name) for name in options.policies]
    machine, about = _machine(options)
    points = [
        Point(policy.name, label, simulate(policy, replace(workload, side=options.side), machine, options.seed))
        for label, workload in _loads(options)
        for policy in policies
    ]
    if options.plot:
        _plot(points, policies, options.plot)
    if options.json:
        print(json.dumps({"machine": about, "points": [_entry(point) for point in points]}, indent=2))
    else:
        print("\n".join(_table(points, about)))
    return 0


def _machine(options: argparse.Namespace) -> "tuple[Machine, str]":
    """The machine, and what its figures are, in words."""
    from .policies.cost import CostModel
    from .policies.reference import MACHINE, PREFILL_S, PREFILL_TOKEN_S, reference_cost
    from .policies.simulator import Machine
    from .policies.workload import MOST_TOKENS

    for name in ("block", "requests", "prompt_tokens", "output_tokens", "kv_tokens", "max_running"):
        _check(f"--{name.replace('_', '-')}", getattr(options, name), 1, MOST.get(name, MOST_TOKENS))
    if options.seed < 0:
        raise PolicyError("--seed", 0, 0, f"must be 0 or more, not {options.seed}")
    _check("--side", options.side, 0, 1)
    cost, about = reference_cost(), MACHINE
    if options.cost is not None:
        loaded = CostModel.load(options.cost)
        if loaded is None or not loaded.ready:
            problem = "holds no profile; `dspark-sgl profile --list` lists this machine's"
            raise PolicyError(str(options.cost), 0, 0, problem)
        cost, about = loaded, str(options.cost)
    prefill, per_token = PREFILL_S, PREFILL_TOKEN_S
    if options.prefill_ms is not None:
        prefill = 1e-3 * _check("--prefill-ms", options.prefill_ms, 0, 1e6)
    if options.prefill_token_us is not None:
        per_token = 1e-6 * _check("--prefill-token-us", options.prefill_token_us, 0, 1e6)
    assumed = options.cost and None in (options.prefill_ms, options.prefill_token_us)
    taken = "the reference machine's " if assumed else ""
    about += f"; {taken}prefill: {1e3 * prefill:g} ms and {1e6 * per_token:g} us a token"
    chances = "as the trace says" if options.trace else f"{options.acceptance} per position"
    about += f"; drafts accepted: {chances}"
    return Machine(cost, options.block, prefill, per_token, options.kv_tokens, options.max_running), about


def _check(option: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise PolicyError(option, 0, 0, f"must be from {low:g} to {high:g}, not {value}")
    return value


def _loads(options: argparse.Namespace) -> "Iterator[tuple[str, Workload]]":
    from .policies.workload import closed_loop, load_trace, open_loop

    if options.trace is not None:
        yield options.trace.stem, load_trace(options.trace)
        return
    given = _numbers("--acceptance", options.acceptance, 0, 1)
    acceptance = [*given, *[given[-1]] * options.block][: options.block]
    shape = (options.requests, options.prompt_tokens, options.output_tokens, acceptance, options.seed)
    if options.rate is not None:
        for rate in _numbers("--rate", options.rate, 1e-6, 1e6):
            yield f"{rate:g}/s", open_loop(rate, *shape)
        return
    for users in _numbers("--users", options.users, 1, 10**6, whole=True):
        yield f"{users:.0f} user{'s' if users > 1 else ''}", closed_loop(int(users), *shape)


def _numbers(option: str, text: str, low: float, high: float, whole: bool = False) -> list[float]:
    try:
        values = [float(int(part) if whole else float(part)) for part in text.split(",")]
    except (ValueError, OverflowError):
        values = []
    if not values or not all(low <= value <= high for value in values):
        kind = "whole numbers" if whole else "numbers"
        raise PolicyError(option, 0, 0, f"takes {kind} from {low:g} to {high:g} with commas between, not {text!r}")
    return values


def _entry(point: Point) -> dict[str, Any]:
    result = point.result
    return {
        "policy": point.policy,
        "load": point.load,
        "requests": result.requests,
        "seconds": result.seconds,
        "output_tps": result.output_tps,
        "user_tps": result.user_tps,
        "depth": result.depth,
        "plain_share": result.plain_share,
        "accepted_length": result.accepted_length,
        "ttft_s": result.ttft_s,
        "timeline": {
            name: column.round(4).tolist()
            for name, column in zip(("seconds", "depth", "running", "output_tps"), result.timeline.T, strict=True)
        },
    }


def _table(points: Sequence[Point], about: str) -> list[str]:
    width = max(len(point.policy) for point in points)
    titles = f"{'tokens/s':>9} {'per user':>9} {'depth':>6} {'plain':>6} {'accepted':>9} {'TTFT ms':>8}"
    head = f"{'load':12} {'policy':{width}} {titles}"
    rows = [
        f"{p.load:12} {p.policy:{width}} {p.result.output_tps:9.1f} {p.result.user_tps:9.1f} {p.result.depth:6.2f} "
        f"{100 * p.result.plain_share:5.0f}% {p.result.accepted_length:9.2f} {1e3 * p.result.ttft_s:8.0f}"
        for p in points
    ]
    return [about, "", head, *rows]


def _plot(points: Sequence[Point], policies: Sequence[Policy], file: Path) -> None:
    figure = new_figure("--plot", 11, 4.5)
    frontier, time = figure.subplots(1, 2)
    for policy in policies:
        mine = [point for point in points if point.policy == policy.name]
        speeds = [(point.result.user_tps, point.result.output_tps) for point in mine]
        frontier.plot(*zip(*speeds, strict=True), marker="o", label=policy.name)
        last = mine[-1].result.timeline
        time.plot(last[:, 0], last[:, 1], label=f"{policy.name}, {mine[-1].load}")
    frontier.set(xlabel="tokens per second and user", ylabel="tokens per second")
    time.set(xlabel="seconds of decoding", ylabel="draft tokens verified per request")
    for axis in (frontier, time):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save(figure, file)
