"""`dspark-sgl completion bash|zsh`: prints a script for tab completion, made from the parser itself.

The words are in the script, so a Tab starts no Python. It knows commands, options and the shipped policies; everything
else is completed as a file.
"""

import argparse
from collections.abc import Iterator

from .policies.shipped import shipped_names

HELP = "print a script for tab completion"
POLICY_METAVAR = "NAME|FILE"  # an argument that takes a policy is recognised by it

_SCRIPT = """\
{head}_dspark_sgl() {{
    local word path="" words=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$path $word" in {commands}) path="$path $word" ;; esac
    done
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dspark_sgl dspark-sgl
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = "~/.local/share/bash-completion/completions/dspark-sgl"
    parser.add_argument("shell", choices=("bash", "zsh"), help=f"bash: write to {place}; zsh: to a file it sources")


def run(options: argparse.Namespace) -> int:
    print(script(options.parser, options.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for a command line that this parser reads."""
    nodes = dict(_walk(parser, ""))
    commands = "|".join(f'"{path}"' for path in nodes if path)
    cases = "\n".join(f'        "{path}") words="{" ".join(words)}" ;;' for path, words in nodes.items())
    return _SCRIPT.format(head=_ZSH if shell == "zsh" else "", commands=commands, cases=cases)


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """Every (sub)command as ` policy lint`, with the words that may follow it."""
    words: list[str] = []
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        words += [str(choice) for choice in action.choices or ()]
        words += shipped_names() if action.metavar == POLICY_METAVAR else []
    yield path, words
    for name, command in below.items():
        yield from _walk(command, f"{path} {name}")
