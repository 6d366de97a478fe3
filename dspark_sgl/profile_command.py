"""`dspark-sgl profile`: what a step costs, as servers of this machine measured it at their start.

Lists the profiles in the cache, prints one as a table and draws it; measures nothing itself. Needs neither torch nor
SGLang; the picture needs matplotlib.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cache_dir
from .picture import check_picture, new_figure, save
from .policies.errors import PolicyError

if TYPE_CHECKING:
    from .policies.cost import CostModel

HELP = "show what a step costs, as profiled by a server at its start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", metavar="ID|PROFILE.json", help="default: the newest")
    parser.add_argument("--list", action="store_true", help="list the profiles of this machine, newest first")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw seconds over rows and requests")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(options: argparse.Namespace) -> int:
    if options.list:
        return _list(options.json)
    check_picture("--plot", options.plot)
    file = _find(options.profile)
    cost, about = _read(file)
    if options.plot:
        _plot(cost, about, options.plot)
    if options.json:
        print(json.dumps({"file": str(file), "about": about, "points": [asdict(p) for p in cost.points]}, indent=2))
    else:
        print("\n".join(_lines(file, cost, about)))
    return 0


# -- Finding and reading ---------------------------------------------------------------------------------------------


def _profiles() -> list[Path]:
    """Cached profiles, newest first."""
    return sorted(cache_dir("costs").glob("*.json"), key=lambda file: (-file.stat().st_mtime, file.name))


def _find(wanted: str | None) -> Path:
    """A file, or the cached profile whose name starts like this; None: the newest."""
    if wanted is not None and Path(wanted).is_file():
        return Path(wanted)
    found = [file for file in _profiles() if file.name.startswith(wanted or "")]
    if wanted is None and found:
        return found[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise PolicyError(wanted or "", 0, 0, f"is the start of {len(found)} profiles; `dspark-sgl profile --list`")
    if wanted is None:
        raise PolicyError(str(cache_dir("costs")), 0, 0, "holds no profile; a server makes one when it starts")
    raise PolicyError(wanted, 0, 0, "is neither a file nor a cached profile; `dspark-sgl profile --list` names those")


def _read(file: Path) -> "tuple[CostModel, dict[str, Any]]":
    from .policies.cost import CostModel  # numpy, which the other commands do without

    cost = CostModel.load(file)
    if cost is None or not cost.ready:
        raise PolicyError(str(file), 0, 0, "holds no profile that this version reads; delete it and start a server")
    return cost, json.loads(file.read_text()).get("about") or {}


# -- In words --------------------------------------------------------------------------------------------------------


def _list(as_json: bool) -> int:
    entries: list[dict[str, Any]] = []
    for file in _profiles():
        try:
            entries.append({"id": file.stem, "about": _read(file)[1]})
        except PolicyError as error:
            entries.append({"id": file.stem, "about": {}, "error": error.message})
    if as_json:
        print(json.dumps(entries, indent=2))
        return 0
    for entry in entries:
        print(f"{entry['id']}  {entry.get('error') or _title(entry['about'])}")
    if not entries:
        print(f"{cache_dir('costs')} holds no profile; a server makes one when it starts")
    return 0


def _title(about: dict[str, Any]) -> str:
    """`smollm2-135m-instruct, DSPARK_SGL, float32, tp 1, x86_64`."""
    said = [Path(str(about.get("model", "?"))).name, str(about.get("algorithm", "?"))]
    said.append(str(about.get("dtype", "?")).removeprefix("torch."))
    return ", ".join([*said, f"tp {about.get('tp', '?')}", str(about.get("device", "?"))])


_MEANING = {
    "plain": "a decode step without drafts, by requests",
    "draft": "drafting, by requests and depth",
    "verify": "a verify, by requests and rows of each",
}


def _lines(file: Path, cost: "CostModel", about: dict[str, Any]) -> list[str]:
    lines = [str(file), *(f"  {key:10} {value}" for key, value in about.items() if value is not None)]
    for kind, meaning in _MEANING.items():
        contexts = sorted({point.context // point.requests for point in cost.points if point.kind == kind})
        lines += ["", f"{kind}: {meaning}; milliseconds"]
        lines.append("".join(cell.rjust(14) for cell in ["context", *map(str, contexts)]))
        for requests, rows in sorted({(p.requests, p.rows) for p in cost.points if p.kind == kind}):
            size = str(requests) if kind == "plain" else f"{requests} x {rows // requests}"
            cells = [_cell(cost, kind, requests, rows, context) for context in contexts]
            lines.append("".join(cell.rjust(14) for cell in [size, *cells]))
    return lines


def _cell(cost: "CostModel", kind: str, requests: int, rows: int, context: int) -> str:
    """Milliseconds at this context per request; measured twice, both are shown."""
    found = [
        f"{1e3 * point.seconds:.1f}"
        for point in cost.points
        if (point.kind, point.requests, point.rows, point.context // point.requests) == (kind, requests, rows, context)
    ]
    return ", ".join(found) or "-"


# -- As a picture ----------------------------------------------------------------------------------------------------


def _plot(cost: "CostModel", about: dict[str, Any], out: Path) -> None:
    """Steps at the shortest context: as measured, and as the cost model prices them."""
    import numpy as np

    figure = new_figure("--plot", 7, 4)
    axes = figure.add_subplot(title="What a step costs", xlabel="rows of the target's forward", ylabel="milliseconds")
    each = min(point.context // point.requests for point in cost.points)  # context of one request, in tokens
    measured = {(p.kind, p.requests, p.rows): p.seconds for p in cost.points if p.context == each * p.requests}
    plain = sorted(requests for kind, requests, _ in measured if kind == "plain")
    axes.plot(plain, [1e3 * measured["plain", n, n] for n in plain], "ko", alpha=0.6)
    axes.plot(plain, [1e3 * cost.plain_seconds(n, each * n) for n in plain], "k-", linewidth=1, label="plain step")
    for requests in plain[::2]:
        draft = max((s for (kind, n, _), s in measured.items() if (kind, n) == ("draft", requests)), default=0.0)
        rows = np.array(sorted(m for kind, n, m in measured if (kind, n) == ("verify", requests)), dtype=np.int64)
        dots = axes.plot(rows, [1e3 * (draft + measured["verify", requests, m]) for m in rows.tolist()], "o", alpha=0.6)
        model = 1e3 * cost.round_seconds(requests, rows, each * requests)
        axes.plot(rows, model, "-", color=dots[0].get_color(), linewidth=1, label=f"round, batch of {requests}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(title="dots: measured, lines: the model", fontsize="small")
    figure.supxlabel(f"{_title(about)}; {each} tokens per request", fontsize="x-small", color="gray")
    save(figure, out)
