"""`dspark-sgl policy explain`: which rule fires at a load, which limits follow, and the depth over a grid of loads.

Needs neither torch nor SGLang; the picture needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .picture import check_picture, new_figure, save
from .policies.errors import PolicyError
from .policies.explain import Explanation, Load, Verdict, explain, parse_load
from .policies.language import MAX_DEPTH, Policy, Schedule, TableSchedule, as_json
from .policies.shipped import find_policy
from .policies.signals import SIGNALS

HELP = "say which rule fires at a load, and how deep the policy then goes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="NAME|FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SIGNAL=VALUE,..", help="the load; may be given several times"
    )
    parser.add_argument("--block", type=int, default=7, metavar="N", help="the drafter's depth (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the depth over the loads")


def run(options: argparse.Namespace) -> int:
    check_picture("--plot", options.plot)
    policy = find_policy(options.policy)
    load, block = _read(options)
    found = explain(policy, load, block)
    grid, machine = _grid(policy, load, block)
    if options.plot:
        _plot(policy, grid, machine, options.plot)
    if options.json:
        print(json.dumps(_report(policy, load, found, grid, machine), indent=2))
    else:
        print("\n".join(_lines(policy, load, found, grid, machine)))
    return 0


def _read(options: argparse.Namespace) -> tuple[Load, int]:
    if not 1 <= options.block <= MAX_DEPTH:
        raise PolicyError("--block", 0, 0, f"must be from 1 to {MAX_DEPTH}, not {options.block}")
    try:
        return parse_load(options.set), options.block
    except ValueError as error:
        raise PolicyError("explain", 0, 0, str(error)) from None


def _grid(policy: Policy, load: Load, block: int) -> tuple[list[Any], str]:
    from .policies import grid, reference  # numpy, which the other commands do without

    return list(grid.depth_grid(policy, load, block, reference.reference_cost())), reference.DESCRIPTION


def _report(policy: Policy, load: Load, found: Explanation, grid: Sequence[Any], machine: str) -> dict[str, Any]:
    return {
        "policy": policy.name,
        "digest": policy.digest,
        "load": {name: load[name] for name in SIGNALS if load[name] is not None},
        "rules": as_json(found.rules),
        "active": as_json(found.active),
        "limits": as_json(found.limits),
        "grid": {"machine": machine, "points": [asdict(point) for point in grid]},
    }


def _lines(policy: Policy, load: Load, found: Explanation, grid: Sequence[Any], machine: str) -> list[str]:
    given = {name: load[name] for name in SIGNALS if load[name] is not None}
    return [
        f"{policy.name}: {policy.description}" if policy.description else policy.name,
        "",
        "load       " + "  ".join(f"{name}={_plain(value)}" for name, value in given.items()),
        *(f"rule       line {rule.line}, {rule.when}: {_verdict(rule)}" for rule in found.rules),
        f"schedule   {_said(found.active.schedule)}{_unread_table(found.active.schedule, load)}",
        f"shape      {_said(found.active.shape)}",
        *(
            f"limits     tier {tier}: depth {limit.min_depth} to {limit.max_depth}, weight {limit.weight:g}"
            for tier, limit in found.limits.items()
        ),
        "",
        f"drafts verified per request, by batch.size and context ({machine})",
        *_table(grid),
    ]


def _verdict(rule: Verdict) -> str:
    if rule.fires:
        return "fires for such a request" if rule.per_request else "fires"
    if rule.holds:
        return "holds, but an earlier rule fires"
    return f"silent, {', '.join(rule.absent)} not given" if rule.absent else "does not hold"


def _said(part: object) -> str:
    said = as_json(part)
    assert isinstance(said, dict)
    rest = [f"{key} {_plain(value)}" for key, value in said.items() if key != "kind"]
    return ", ".join([str(said["kind"]), *rest])


def _unread_table(schedule: Schedule, load: Load) -> str:
    if not isinstance(schedule, TableSchedule) or load[schedule.by] is not None:
        return ""
    return f"; {schedule.by} is not given: its shallowest point holds"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _table(grid: Sequence[Any]) -> list[str]:
    contexts = sorted({point.context for point in grid})
    depth = {(point.batch_size, point.context): point for point in grid}
    rows = [["batch.size", *(f"{context} tokens" for context in contexts)]]
    for size in sorted({point.batch_size for point in grid}):
        rows.append([str(size), *(_cell(depth[size, context]) for context in contexts)])
    return ["  " + "".join(cell.rjust(16) for cell in row) for row in rows]


def _cell(point: Any) -> str:
    rule = f" (line {point.line})" if point.line else ""
    return f"{point.depth:.1f}{rule}"


def _plot(policy: Policy, grid: Sequence[Any], machine: str, out: Path) -> None:
    figure = new_figure("--plot", 7, 4)
    axes = figure.add_subplot(
        title=f"{policy.name}: drafts by load", xlabel="batch.size", ylabel="verified tokens per request"
    )
    for context in sorted({point.context for point in grid}):
        points = [point for point in grid if point.context == context]
        axes.plot([p.batch_size for p in points], [p.depth for p in points], marker="o", label=f"context {context}")
    sizes = sorted({point.batch_size for point in grid})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.supxlabel(machine, fontsize="x-small", color="gray")
    save(figure, out)
