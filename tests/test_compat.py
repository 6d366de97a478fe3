"""The list of SGLang names is complete and true, and a name that goes missing is one clear line."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_sgl import compat
from dspark_sgl.compat import SURFACE, CompatError, HostName, check, require

ROOT = Path(__file__).parent.parent

HOST = """
from enum import Enum
from .other import helper as renamed

class Base:
    def inherited(self, kept): ...

class Kind(Enum):
    ONE = 1

class Worker(Base):
    field: int = 0
    def __init__(self, size, *, width): self.pool = (self.a, self.b) = size, width
    def run(self, batch, **more): ...

Worker = print(Worker)

try:
    from fast import kernel
except ImportError:
    def kernel(x): ...
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package to look into that cannot be imported: nothing of the host may ever run."""
    package = tmp_path / "fakehost"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "sub" / "__init__.py").write_text("from .mod import Worker\n")
    (package / "sub" / "mod.py").write_text("raise RuntimeError('imported')\n" + HOST)
    (package / "sub" / "other.py").write_text("def helper(a, b): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "fakehost.sub"


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("mod", ()),
        ("mod.Worker", ("size", "width")),
        ("Worker.run", ("batch", "whatever")),
        ("mod.Worker.inherited", ("kept",)),
        ("mod.Worker.field", ()),
        ("mod.Worker.pool", ()),
        ("mod.Worker.b", ()),
        ("mod.Kind.ONE", ()),
        ("mod.renamed", ("a", "b")),
        ("mod.kernel", ()),
    ],
)
def test_a_name_that_is_there_is_found(host: str, path: str, parameters: tuple[str, ...]):
    assert check((HostName(f"{host}.{path}", parameters),)) == []
    assert "fakehost" not in sys.modules


@pytest.mark.parametrize("path", ["mod.Gone", "mod.Worker.gone", "mod.Kind.TWO", "gone.Worker", "other.gone"])
def test_a_name_that_is_gone_is_one_line(host: str, path: str):
    assert check((HostName(f"{host}.{path}", (), "for tests"),)) == [f"{host}.{path} is gone (for tests)"]


def test_a_parameter_that_is_gone_is_one_line(host: str):
    name = HostName(f"{host}.mod.Worker", ("size", "depth"), "for tests")
    assert check((name,)) == [f"{host}.mod.Worker no longer takes 'depth' (for tests)"]


def test_require_names_both_versions_and_the_remedy(host: str):
    names = tuple(HostName(f"{host}.mod.{n}", (), "for tests") for n in ("Gone", "GoneToo"))
    with pytest.raises(CompatError) as caught:
        require(names)
    line = str(caught.value)
    assert "\n" not in line
    for words in (
        str(compat.installed()),
        "tested with 0.5.23",
        "Gone is gone",
        "1 more",
        "pip install sglang==0.5.23",
    ):
        assert words in line


def test_a_missing_sglang_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "installed", lambda: None)
    with pytest.raises(CompatError, match="not installed; pip install"):
        require()


def test_the_installed_sglang_offers_everything_we_use():
    assert check() == []


def test_the_list_has_everything_that_our_code_imports():
    listed = [name.path for name in SURFACE]
    missing = {
        f"{file.relative_to(ROOT)}: {used}"
        for folder in ("dspark_sgl", "spec_algos")
        for file in (ROOT / folder).rglob("*.py")
        for used in _sglang_names(ast.parse(file.read_text()))
        if not any(f"{path}.".startswith(f"{used}.") for path in listed)
    }
    assert not missing, "name these in dspark_sgl/compat_surface.py"


def test_every_name_is_listed_once_with_a_reason():
    assert len({name.path for name in SURFACE}) == len(SURFACE)
    assert all(name.why for name in SURFACE)


def _sglang_names(node: ast.AST) -> Iterator[str]:
    """Imports from SGLang and dotted paths of its functions in strings (hooks); not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "sglang":
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] == "sglang")
            case ast.Constant(value=str(text)) if text.startswith("sglang.srt.") and text.count(".") > 2:
                yield text
        yield from _sglang_names(child)
