"""`dspark-sgl bench`: measurements on real servers. Here is `accept`, how many tokens a drafter's rounds yield, by
domain and position; `load` is in `load_command.py`.

By default every round of `accept` verifies the drafter's whole block, so drafters are compared and not policies.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import load_command
from .accept_counts import by_domain
from .collect import Collector
from .completion_command import POLICY_METAVAR
from .launch import STDOUT, add_json_argument, add_server_arguments, check_output, write_json
from .policies.errors import PolicyError
from .policies.shipped import find_policy
from .prompts import Prompt, read_prompts
from .recorder import RecordedRound

HELP = "measure on real servers"
ACCEPT = """How many tokens a drafter's rounds yield, by domain and position, from a real server. By default every round
verifies the drafter's whole block, so drafters are compared and not policies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    accept = benches.add_parser("accept", help="accepted length and acceptance by position", description=ACCEPT)
    add_server_arguments(accept)
    accept.add_argument("--prompts", type=Path, required=True, metavar="F.jsonl", help='lines with "prompt", "domain"')
    accept.add_argument("--temperature", type=_floats, action="extend", metavar="X,..", help="default: 1")
    accept.add_argument("--policy", metavar=POLICY_METAVAR, help="default: the drafter's whole block, always")
    add_json_argument(accept)
    accept.set_defaults(act=_accept)
    load = benches.add_parser(
        "load", help=load_command.HELP, description=load_command.DESCRIPTION, epilog=load_command.EPILOG
    )
    load_command.add_arguments(load)


def _floats(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, not {text!r}") from None


def run(options: argparse.Namespace) -> int:
    code: int = options.act(options)
    return code


def _accept(options: argparse.Namespace) -> int:
    temperatures = sorted(set(options.temperature or [1.0]))
    if temperatures[0] < 0:
        raise PolicyError("--temperature", 0, 0, f"must be at least 0, not {temperatures[0]:g}")
    prompts = read_prompts(options.prompts, options.limit)
    check_output("--json", options.json)
    if options.policy:
        find_policy(options.policy)
    reports: dict[str, Any] = {}
    with Collector(options, options.policy) as collector:
        facts = {
            **collector.facts(),
            "prompts": {"file": options.prompts.name, "count": len(prompts)},
            "max_new_tokens": options.max_new_tokens,
        }
        for temperature in temperatures:
            found = _measure(collector, prompts, temperature)
            reports[f"{temperature:g}"] = {**found, "run": {**facts, "temperature": temperature}}
            if options.json != STDOUT:
                print("\n".join([f"temperature {temperature:g}", *_table(found), ""]), flush=True)
    if options.json:
        # One temperature has the shape of the design; several are such reports by temperature.
        report = next(iter(reports.values())) if len(reports) == 1 else {"temperatures": reports}
        write_json(options.json, report)
    return 0


def _measure(collector: Collector, prompts: Sequence[Prompt], temperature: float) -> dict[str, Any]:
    rounds = collector.run(prompts, temperature, f"temperature {temperature:g}")
    domains: dict[str, list[RecordedRound]] = {prompt.domain: [] for prompt in prompts}
    for prompt, mine in zip(prompts, rounds, strict=True):
        domains[prompt.domain].extend(mine)
    found = by_domain(domains)
    if not found["overall"]["rounds"]:
        raise PolicyError(
            "bench accept", 0, 0, "nothing was drafted: the policy, or the model's answers, left no round"
        )
    return found


def _table(found: dict[str, Any]) -> list[str]:
    rows = [("overall", found["overall"]), *found["domains"].items()]
    width = max(len(name) for name, _ in rows)
    positions = range(1, 1 + max(len(entry["acceptance_by_position"]) for _, entry in rows))
    head = f"{'':{width}} {'length':>7} {'rounds':>7} {'tokens':>7}  draft k accepted, given those before it:"
    lines = [head, " " * (width + 24) + "".join(f"{f'k={k}':>7}" for k in positions)]
    for name, entry in rows:
        shares = "".join(f"{'-' if share is None else f'{share:.3f}':>7}" for share in entry["acceptance_by_position"])
        lines.append(
            f"{name:{width}} {_length(entry['accepted_length']):>7} {entry['rounds']:7} {entry['tokens']:7}{shares}"
        )
    lines.append(f"{'macro':{width}} {_length(found['macro']):>7}  (mean of the domains)")
    tree = found["overall"].get("tree")
    if tree is not None:
        said = {key: _length(value) for key, value in tree.items()}
        lines.append(
            f"trees: {tree['nodes']:.1f} drafts a round; where the likeliest child fails another is accepted "
            f"{said['side_accepted']}; goes on after it {said['continued_after_side']}, after a likeliest child "
            f"{said['continued_after_first']}"
        )
    return lines


def _length(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
