"""What the commands that start a server share: its options, checks before the minutes of a run, reasons after.

Never starts one itself.
"""

from __future__ import annotations

import argparse
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from .draft_config import DraftError
from .drafts import check_draft
from .policies.errors import PolicyError
from .server import Server


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What both commands ask about the server and what to run on it."""
    parser.add_argument("--algorithm", default="DSPARK_SGL", metavar="A", help="default: %(default)s")
    parser.add_argument("--model", metavar="T", help="the target (default: that of `make demo`)")
    parser.add_argument("--draft", metavar="D", help="default: the one shipped or cached for the target")
    parser.add_argument("--limit", type=positive, metavar="N", help="use N prompts, domains in turn (default: all)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of an answer (default: %(default)s)"
    )
    parser.add_argument("sglang", nargs="*", metavar="-- ARGUMENT", help="arguments for SGLang's server, behind --")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def check_output(option: str, file: Path | None) -> None:
    """Before the minutes of a run, not after: `file` can be written."""
    if file is not None and (
        file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK)
    ):
        raise PolicyError(option, 0, 0, f"{file} cannot be written")


def check_choice(algorithm: str, model: str, draft: str | None) -> None:
    """What would otherwise be found out a minute later."""
    # Algorithms are named after their entry points (see plugin.py); importing them would take half a minute.
    known = sorted(f"{entry.name.upper()}_SGL" for entry in entry_points(group="dspark_sgl.spec_algos"))
    if algorithm.upper() not in known:
        raise PolicyError("--algorithm", 0, 0, f"{algorithm!r} is unknown; there are {', '.join(known)}")
    if Path(model).is_absolute() and not Path(model).exists():
        raise PolicyError("--model", 0, 0, f"{model}: no such folder")
    if draft and Path(draft).is_dir() and Path(model).is_dir():
        check_draft(draft, model, algorithm)


def from_anywhere(name: str) -> str:
    """The server runs in another folder: what is a path here is made one that holds there."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def demo_target() -> str:
    """The folder of the target that `make demo` uses."""
    from .target import TargetError, make_target

    try:
        return str(make_target())
    except TargetError as error:
        raise DraftError(f"--model: {error}") from None


def ended(server: Server) -> PolicyError:
    """What to raise when a server has ended by itself."""
    return PolicyError("server", 0, 0, f"it ended: {_reason(server.log)}; its log: {server.log_file}")


def _reason(log: str) -> str:
    """The line of a server's log that says why it ended: ours, else the last error that it raised, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it printed nothing"]
    for start in (r"error: ", r"[\w.]*(Error|Exception)\b"):
        said = [line for line in lines if re.match(start, line)]
        if said:
            return said[-1].removeprefix("error: ")
    return lines[-1]
