"""All of SGLang that this package stands on: name, parameters we pass, and why we need it.

`require()` runs when a server loads the plugin, so that another version of SGLang is one clear message at the start and
never a crash in a request. A test compares the list with the imports of our own code.
"""

from importlib.metadata import PackageNotFoundError, version

from .compat_surface import SURFACE, HostName
from .source_index import find, parameters

__all__ = ["SURFACE", "TESTED", "CompatError", "HostName", "check", "installed", "require"]

TESTED = "0.5.23"


class CompatError(RuntimeError):
    """The installed SGLang lacks something we use; one line."""


def installed() -> str | None:
    """The installed version of SGLang, or None."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def check(surface: tuple[HostName, ...] = SURFACE) -> list[str]:
    """One line for each name that is gone and each parameter that is not taken any more."""
    return [problem for name in surface for problem in _problems(name)]


def require(surface: tuple[HostName, ...] = SURFACE) -> None:
    """Raises CompatError unless the installed SGLang offers everything we use."""
    have = installed()
    if have is None:
        raise CompatError(f"SGLang is not installed; pip install sglang=={TESTED}")
    problems = check(surface)
    if problems:
        more = f" (and {len(problems) - 1} more: dspark-sgl doctor)" if len(problems) > 1 else ""
        raise CompatError(
            f"SGLang {have} does not fit dspark-sgl, which is tested with {TESTED}: {problems[0]}{more}; "
            f"pip install sglang=={TESTED}"
        )


def _problems(name: HostName) -> list[str]:
    definition = find(name.path)
    if definition is None:
        return [f"{name.path} is gone ({name.why})"]
    accepted = parameters(definition)
    gone = [] if accepted is None else [p for p in name.parameters if p not in accepted]
    return [f"{name.path} no longer takes {parameter!r} ({name.why})" for parameter in gone]
