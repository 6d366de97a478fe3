"""One package, three ways to have it: a wheel, an editable install and the repository root import the same.

Every check runs in a fresh interpreter without `.pth` files, so that an install of this project in the surrounding
environment cannot answer for the one under test. Nothing is downloaded.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("dspark_sgl", "spec_algos", "policies", "kernels", "policies_yaml")
SITE = sysconfig.get_path("purelib")

PROBE = """
import json, sys
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
import dspark_sgl
from dspark_sgl import drafts
from dspark_sgl.policies import find_policy, shipped_names

home = Path(dspark_sgl.__file__).parent
points = distribution("dspark-sgl").entry_points if {installed} else []
print(json.dumps({{
    "version": dspark_sgl.__version__,
    "missing": [name for name in {modules} if find_spec(name) is None],
    "policies": [find_policy(name).name for name in shipped_names()],
    "drafts": sorted(path.name for path in drafts.known_drafts()),
    "typed": (home / "py.typed").is_file(),
    "points": sorted(f"{{p.group}}: {{p.name}} = {{p.value}}" for p in points),
}}))
print(home, file=sys.stderr)
"""


def installed_name(file: Path) -> Path:
    """Where a file of the checkout lies in an installation."""
    return file if file.parts[0] == "dspark_sgl" else Path("dspark_sgl") / file


def shipped_files() -> list[Path]:
    """Everything of the checkout that belongs into a wheel, relative to the root."""
    files = [file.relative_to(ROOT) for part in PARTS for file in (ROOT / part).rglob("*") if file.is_file()]
    return [file for file in files if "__pycache__" not in file.parts and not file.name.startswith(".")]


def modules() -> list[str]:
    names = [installed_name(file).with_suffix("") for file in shipped_files() if file.suffix == ".py"]
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in names)


def probe(setup: str, cwd: Path, installed: bool) -> tuple[dict, Path]:
    """What an interpreter sees of us after `setup`, and where it found us."""
    code = f"import sys; sys.path.append({SITE!r}); {setup}\n"
    code += PROBE.format(modules=modules(), installed=installed)
    environment = {"XDG_CACHE_HOME": str(cwd / "no-cache"), "PATH": ""}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), Path(done.stderr.strip())


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building in place would leave folders behind that later builds pick up."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(checkout: Path, hook: str) -> Path:
    """Runs a build hook of the package's backend and unpacks the wheel that comes out."""
    out = checkout.with_name(f"{checkout.name}-{hook}")
    code = f"import os; os.makedirs({str(out)!r}); import setuptools.build_meta as b; b.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(out / "site")
    return out / "site"


@pytest.fixture(scope="session")
def wheel(checkout: Path) -> Path:
    return build(checkout, "build_wheel")


def test_the_wheel_holds_what_the_checkout_holds(wheel: Path):
    have = {str(file.relative_to(wheel)) for file in wheel.rglob("*") if file.is_file()}
    have = {name for name in have if ".dist-info/" not in name}
    assert have == {str(installed_name(file)) for file in shipped_files()}


def test_wheel_editable_and_repository_root_import_the_same(checkout: Path, wheel: Path, tmp_path: Path):
    editable = build(checkout, "build_editable")
    from_wheel, wheel_home = probe(f"sys.path.insert(0, {str(wheel)!r})", tmp_path, installed=True)
    from_editable, editable_home = probe(
        f"import site; sys.path.insert(0, {str(editable)!r}); site.addsitedir({str(editable)!r})", tmp_path, True
    )
    from_root, root_home = probe("sys.path.insert(0, '')", checkout, installed=False)

    assert wheel_home == wheel / "dspark_sgl"
    assert editable_home == root_home == checkout / "dspark_sgl"
    assert from_wheel["missing"] == []
    assert from_wheel["typed"]
    assert "off" in from_wheel["policies"]
    assert from_wheel == from_editable
    assert from_wheel | {"points": []} == from_root


def test_every_entry_point_leads_to_something_of_ours(wheel: Path, tmp_path: Path):
    points = probe(f"sys.path.insert(0, {str(wheel)!r})", tmp_path, installed=True)[0]["points"]
    groups = {"sglang.srt.plugins", "sglang.srt.platforms", "dspark_sgl.spec_algos", "console_scripts"}
    assert {point.partition(":")[0] for point in points} == groups
    for point in points:
        module, _, attribute = point.rpartition(" = ")[2].partition(":")
        assert module in modules()
        assert callable(getattr(import_module(module), attribute))


def test_hugging_faces_kernels_is_not_shadowed_in_the_repository_root():
    code = "import importlib.util as u, sys; assert sys.path[0] == ''; print(u.find_spec('kernels').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith(str(ROOT / "kernels"))
    assert done.stdout.strip().endswith("__init__.py")


def test_nothing_at_the_top_level_shadows_an_installed_module():
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    taken = {name for name, owners in packages_distributions().items() if set(owners) != {"dspark-sgl"}}
    assert ours & (taken | sys.stdlib_module_names) == set()
