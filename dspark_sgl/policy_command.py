"""`dspark-sgl policy lint|show|schema|explain|simulate`: checks policies, prints them, says what they do. No torch."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from . import explain_command, simulate_command
from .policies.errors import PolicyError
from .policies.language import as_json
from .policies.reader import parse_policy
from .policies.schema import schema_text
from .policies.shipped import find_policy, policy_source

HELP = "check, show, explain and simulate policies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, act: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        parser.set_defaults(act=act)
        return parser

    lint = action("lint", _lint, "check policies; exit code 1 when one is faulty")
    lint.add_argument("policies", nargs="+", metavar="NAME|FILE")
    show = action("show", _show, "print a policy as it is written; with --json, as it is understood")
    show.add_argument("policy", metavar="NAME|FILE")
    explain = action("explain", explain_command.run, explain_command.HELP)
    explain_command.add_arguments(explain)
    simulate = action("simulate", simulate_command.run, simulate_command.HELP)
    simulate_command.add_arguments(simulate)
    for reporting in (lint, show, explain, simulate):
        reporting.add_argument("--json", action="store_true", help="machine-readable output")
    action("schema", _schema, "print the JSON Schema, for an editor that completes and checks")


def run(options: argparse.Namespace) -> int:
    code: int = options.act(options)
    return code


def _lint(options: argparse.Namespace) -> int:
    results = [_verdict(policy) for policy in options.policies]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(f"{result['policy']}: ok" if result["ok"] else result["error"]["text"])
    return 0 if all(result["ok"] for result in results) else 1


def _verdict(policy: str) -> dict[str, Any]:
    try:
        return {"policy": policy, "ok": True, "name": find_policy(policy).name}
    except PolicyError as error:
        place = {"file": error.file, "line": error.line, "column": error.column}
        return {"policy": policy, "ok": False, "error": {**place, "message": error.message, "text": str(error)}}


def _show(options: argparse.Namespace) -> int:
    file, content = policy_source(options.policy)
    policy = parse_policy(content, file)  # what is shown is known to be sound
    if options.json:
        print(json.dumps(as_json(policy), indent=2))
    else:
        sys.stdout.write(content.decode("utf-8-sig"))
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(schema_text(), end="")
    return 0
