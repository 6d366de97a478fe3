"""What the commands that start a server share: its options, checks before the minutes of a run, reasons after.

Never starts one itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from .draft_config import DraftError
from .drafts import check_draft
from .policies.errors import PolicyError
from .server import NotReady, Server, ServerError
from .unserved import refuse_target

STDOUT = Path("-")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+|\w+://\S+")
"""`owner/name`, or a place that SGLang reads from elsewhere, as `s3://..`."""


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands ask about the server and what to run on it."""
    parser.add_argument("--algorithm", default="DSPARK_SGL", metavar="A", help="default: %(default)s")
    parser.add_argument("--model", "--model-path", metavar="T", help="the target (default: that of `make demo`)")
    parser.add_argument("--draft", metavar="D", help="default: the one shipped or cached for the target")
    parser.add_argument("--limit", type=positive, metavar="N", help="use N prompts, domains in turn (default: all)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of an answer (default: %(default)s)"
    )
    parser.add_argument("sglang", nargs="*", metavar="-- ARGUMENT", help="arguments for SGLang's server, behind --")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json [OUT]`, for `write_json`."""
    said = "the figures as JSON: to a file, or on stdout instead of the table"
    parser.add_argument("--json", nargs="?", type=Path, const=STDOUT, metavar="OUT", help=said)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def check_output(option: str, file: Path | None) -> None:
    """Before the minutes of a run, not after: `file` can be written."""
    if file is None or file == STDOUT:
        return
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise PolicyError(option, 0, 0, f"{file} cannot be written")


def write_json(file: Path, report: Any) -> None:
    """To a file that `check_output` has let pass, or to stdout."""
    text = json.dumps(report, indent=1)
    if file == STDOUT:
        print(text)
    else:
        file.write_text(text + "\n")


def check_algorithm(name: str) -> EntryPoint:
    """The entry point of the drafter of this name (see plugin.py). Not loaded: most would import SGLang."""
    known = {f"{entry.name.upper()}_SGL": entry for entry in entry_points(group="dspark_sgl.spec_algos")}
    if name.upper() not in known:
        raise PolicyError("--algorithm", 0, 0, f"{name!r} is unknown; there are {', '.join(sorted(known))}")
    return known[name.upper()]


def is_here(option: str, checkpoint: str) -> bool:
    """Whether it is a folder, and not one of a hub. Raises PolicyError for what can be neither."""
    if Path(checkpoint).is_dir():
        return True
    if Path(checkpoint).exists() or not _HUB_NAME.fullmatch(checkpoint):
        raise PolicyError(option, 0, 0, f"{checkpoint}: no such folder; name one, or a model of a hub as owner/name")
    return False


def check_choice(algorithm: str, model: str, draft: str | None) -> None:
    """What would otherwise be found out a minute later."""
    check_algorithm(algorithm)
    here = is_here("--model", model)
    if here:
        refuse_target(Path(model), algorithm)
    if draft and is_here("--draft", draft) and here:
        check_draft(draft, model, algorithm)


def from_anywhere(name: str) -> str:
    """The server runs in another folder: a checkpoint that is a path here is made one that holds there."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def policy_from_anywhere(name: str) -> str:
    """The same for a policy, whose name may also be that of a folder here."""
    return str(Path(name).absolute()) if Path(name).is_file() else name


def demo_target() -> str:
    """The folder of the target that `make demo` uses."""
    from .target import TargetError, make_target

    try:
        return str(make_target())
    except TargetError as error:
        raise DraftError(f"--model: {error}") from None


def ended(server: Server, error: ServerError | None = None) -> PolicyError:
    """What to raise when a server has ended by itself, or did not start for this reason."""
    if isinstance(error, NotReady):
        return PolicyError("server", 0, 0, f"{str(error).splitlines()[0]} its log: {server.log_file}")
    return PolicyError("server", 0, 0, f"it ended: {_reason(server.log)}; its log: {server.log_file}")


def _reason(log: str) -> str:
    """The line of a server's log that says why it ended: ours, else the last error that it raised, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it printed nothing"]
    for start in (r"error: ", r"[\w.]*(Error|Exception)\b"):
        said = [line for line in lines if re.match(start, line)]
        if said:
            return said[-1].removeprefix("error: ")
    return lines[-1]
