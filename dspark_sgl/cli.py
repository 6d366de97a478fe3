"""The command `dspark-sgl`. Each subcommand is a module with `add_arguments(parser)` and `run(options) -> exit code`.

A mistake of the user's is one line on stderr and exit code 1; a traceback means a bug of ours.
"""

import argparse
import os
import sys

from . import (
    __version__,
    bench_command,
    calibrate_command,
    completion_command,
    doctor,
    policy_command,
    profile_command,
    top_command,
)
from .compat import CompatError
from .draft_config import DraftError
from .ending import unwind_when_told_to_end
from .policies.errors import PolicyError

_COMMANDS = {
    "doctor": doctor,
    "policy": policy_command,
    "profile": profile_command,
    "calibrate": calibrate_command,
    "bench": bench_command,
    "top": top_command,
    "completion": completion_command,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dspark-sgl", description="DSpark speculative decoding for SGLang.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=f"{module.HELP[0].upper()}{module.HELP[1:]}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    unwind_when_told_to_end()
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except (CompatError, DraftError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
