"""Finds the drafters: those shipped here and those that other packages register.

A package adds a drafter with one entry point and no edit here:

    [project.entry-points."dspark_sgl.spec_algos"]
    mine = "my_package:MyDrafter"

A drafter that does not import is reported and left out: it never takes the others down.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from .protocol import Drafter

GROUP = "dspark_sgl.spec_algos"


class DrafterError(ValueError):
    """A drafter that cannot be registered: one line that names the entry point and the remedy."""


def load(entry: EntryPoint) -> type[Drafter]:
    """The drafter class behind an entry point."""
    try:
        drafter = entry.load()
    except Exception as error:  # whatever a third party's import raises
        raise DrafterError(f"drafter entry point {entry.name} = {entry.value} does not import: {error}") from error
    if not (isinstance(drafter, type) and issubclass(drafter, Drafter)):
        raise DrafterError(f"drafter entry point {entry.name} = {entry.value} is not a subclass of Drafter")
    if not isinstance(getattr(drafter, "algorithm", None), str):
        raise DrafterError(f"drafter entry point {entry.name} = {entry.value} does not set `algorithm`")
    return drafter


def discover() -> tuple[dict[str, type[Drafter]], list[DrafterError]]:
    """Every registered drafter by algorithm name, and what went wrong with the rest."""
    found: dict[str, type[Drafter]] = {}
    problems: list[DrafterError] = []
    for entry in entry_points(group=GROUP):
        try:
            drafter = load(entry)
        except DrafterError as error:
            problems.append(error)
            continue
        name = drafter.algorithm.upper()
        if name in found and found[name] is not drafter:
            problems.append(DrafterError(f"drafter entry point {entry.name}: algorithm {name} is registered twice"))
            continue
        found[name] = drafter
    return found, problems
