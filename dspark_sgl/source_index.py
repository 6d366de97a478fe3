"""Finds names in an installed package by reading its source, without importing it.

Checking a host by importing it would load half of it into every process of a server, before any hook could act, and
would take seconds; parsing the few files concerned takes a fraction of one. Never runs the host's code.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.stmt
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITION = (*_FUNCTION, ast.ClassDef)


def find(path: str) -> Definition | None:
    """The statement that defines `package.module.Class.attribute`, followed through imports and base classes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        file = _module_file(".".join(parts[:cut]))
        if file:
            return _descend(file, ".".join(parts[:cut]), parts[cut:])
    return None


def parameters(definition: Definition) -> set[str] | None:
    """Parameter names of a function, or of a class's construction; None when it takes anything by keyword."""
    if isinstance(definition, _FUNCTION):
        args = definition.args
        named = {arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
        return None if args.kwarg else named
    if isinstance(definition, ast.ClassDef):
        for statement in definition.body:
            if isinstance(statement, _FUNCTION) and statement.name == "__init__":
                return parameters(statement)
        return {s.target.id for s in definition.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
    return set()


@cache
def _module_file(module: str) -> Path | None:
    top, *rest = module.split(".")
    spec = find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec else []:
        place = Path(root, *rest)
        for file in (place.with_suffix(".py") if rest else None, place / "__init__.py"):
            if file and file.is_file():
                return file
    return None


@cache
def _names(file: Path) -> dict[str, ast.stmt]:
    """Everything a module defines or imports at its top, under `if` and `try` as well."""
    found: dict[str, ast.stmt] = {}
    for name, statement in _defined(ast.parse(file.read_bytes()).body):
        # A definition says more than the import it falls back from, or the `A = decorate(A)` after it.
        if name not in found or (isinstance(statement, _DEFINITION) and not isinstance(found[name], _DEFINITION)):
            found[name] = statement
    return found


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, statement
            case ast.Assign(targets=targets):
                yield from ((target.id, statement) for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.ImportFrom(names=aliases) | ast.Import(names=aliases):
                yield from ((alias.asname or alias.name, statement) for alias in aliases)
            case ast.If() | ast.Try() | ast.With():
                blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
                blocks += [handler.body for handler in getattr(statement, "handlers", [])]
                yield from (pair for block in blocks for pair in _defined(block))


def _descend(file: Path, module: str, names: list[str]) -> Definition | None:
    if not names:
        return ast.Pass()  # the module itself is what was asked for
    found: Definition | None = _names(file).get(names[0])
    if isinstance(found, ast.ImportFrom):
        source = _absolute(found, module, is_package=file.name == "__init__.py")
        original = next(alias.name for alias in found.names if names[0] in (alias.asname, alias.name))
        target = ".".join([source, original, *names[1:]])
        return None if target == ".".join([module, *names]) else find(target)
    for name in names[1:]:
        found = _member(file, module, found, name)
    return found


def _member(file: Path, module: str, owner: Definition | None, name: str) -> Definition | None:
    """A method, a field, or an attribute that any method sets on `self`; else that of a base class."""
    if not isinstance(owner, ast.ClassDef):
        return None
    members = dict(_defined(owner.body))
    if name in members:
        return members[name]
    for node in ast.walk(owner):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if any(isinstance(t, ast.Attribute) and t.attr == name for t in ast.walk(target)):
                    return node
    for base in owner.bases:
        if isinstance(base, ast.Name) and (found := _descend(file, module, [base.id, name])):
            return found
    return None


def _absolute(statement: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parts, statement.module] if statement.module else parts)
