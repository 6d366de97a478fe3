"""The settings SGLang has no field for, carried to every process of the server by the environment.

Never reads a policy file; it only says which one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

POLICY_VARIABLE = "DSPARK_POLICY"
DEFAULT_POLICY = "adaptive"
RECORD_VARIABLE = "DSPARK_RECORD"


def policy_name() -> str:
    """The policy in force: a shipped name or a path."""
    # A compose file makes an empty one of an unset one.
    return os.environ.get(POLICY_VARIABLE) or DEFAULT_POLICY


def record_file() -> Path | None:
    """Where verify rounds are recorded; None, the rule: nowhere."""
    file = os.environ.get(RECORD_VARIABLE)
    return Path(file) if file else None


class _StoreInEnvironment(argparse.Action):
    """SGLang builds its record from known fields only, so the value goes where its child processes find it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        os.environ[POLICY_VARIABLE] = str(values)


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add `--dspark-policy` to SGLang's server arguments."""
    parser.add_argument(
        "--dspark-policy",
        action=_StoreInEnvironment,
        dest="dspark_policy",
        metavar="NAME|FILE",
        help=f"How load maps to verification depth: a shipped policy or a YAML file (default: {DEFAULT_POLICY}; "
        f"also ${POLICY_VARIABLE}).",
    )
