"""`dspark-sgl calibrate`: fits the temperatures that make a draft's confidence mean what it says, and judges them.

Runs prompts over the drafter's whole block, or takes recorded rounds; fits on every second request and judges on the
others; writes `sts.json`, which a server picks up by itself.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .collect import Collector
from .drafts import find_draft
from .launch import STDOUT, add_json_argument, add_server_arguments, check_output, demo_target, write_json
from .picture import check_picture, new_figure, save
from .policies.errors import PolicyError
from .prompts import read_prompts
from .recorder import RecordedRound, read_record
from .sts_file import NAME, find_sts, place_for_sts

if TYPE_CHECKING:  # numpy, which the other commands do without
    from .policies.sts import Position, Rounds

HELP = "fit the draft's confidence to observed acceptance (sequential temperature scaling)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="F.jsonl", help='run these; lines with "prompt"')
    source.add_argument("--record", type=Path, metavar="FILE", help="take rounds of a server with DSPARK_RECORD=FILE")
    parser.add_argument("--temperature", type=float, metavar="X", help="default: 1; of a record: all that are in it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: sts.json beside the draft, or in the cache")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the reliability diagram")
    add_json_argument(parser)


@dataclass(frozen=True)
class Fit:
    """Temperatures, and how well survival was predicted on the held-out half without them and with them."""

    temperatures: list[float]
    fitted_on: dict[str, int]
    held_out: dict[str, int]
    before: list[Position]
    after: list[Position]

    def mean(self, name: str) -> tuple[float, float]:
        """The mean over positions of `ece`, `floor` or `auc`, before and after."""
        before, after = ([getattr(row, name) for row in rows] for rows in (self.before, self.after))
        return _mean(before), _mean(after)


def run(options: argparse.Namespace) -> int:
    for option in ("out", "json"):
        check_output(f"--{option}", getattr(options, option))
    check_picture("--plot", options.plot)
    recorded, facts, draft = _from_record(options) if options.record else _from_server(options)
    fit, held_out = _fit(recorded, facts["source"], "record more" if options.record else "give more prompts")
    out = options.out or _place(draft)
    if options.plot:
        _plot(fit, held_out, options.plot)
    report = _report(fit, facts)
    if options.json:
        write_json(options.json, report)
    _write(out, report)
    if options.json != STDOUT:
        print("\n".join([*_lines(fit), "", f"{out}: written; {_who_reads(out, draft)}"]))
    return 0


def _who_reads(out: Path, draft: Path | None) -> str:
    found = find_sts(draft) if draft else None
    if found and found.resolve() == out.resolve():
        return "servers of this draft take it from their next start on"
    return f"a server reads only {NAME} beside its draft: put it there for one to take it"


# -- Rounds ----------------------------------------------------------------------------------------------------------


def _from_server(options: argparse.Namespace) -> tuple[list[RecordedRound], dict[str, Any], Path | None]:
    """Rounds of the prompts, what was run, and the draft's folder."""
    temperature = 1.0 if options.temperature is None else options.temperature
    prompts = read_prompts(options.prompts, options.limit)
    with Collector(options) as collector:
        rounds = collector.run(prompts, temperature, "calibrate")
        facts = collector.facts()
    # A folder of the user's; else what the server has found or downloaded.
    draft = options.draft if options.draft and Path(options.draft).is_dir() else facts["draft"]
    source = {"source": options.prompts.name, "temperature": temperature, "max_new_tokens": options.max_new_tokens}
    return [r for mine in rounds for r in mine], {**facts, **source}, Path(draft) if draft else None


def _from_record(options: argparse.Namespace) -> tuple[list[RecordedRound], dict[str, Any], Path | None]:
    """The same of a record, which does not say what it was recorded with: that is as the options say."""
    model = options.model or demo_target()
    draft = Path(options.draft) if options.draft else find_draft(model, options.algorithm)
    recorded = list(read_record(options.record))
    rounds = [r for r in recorded if options.temperature in (None, r.temperature)]
    if recorded and not rounds:
        has = ", ".join(f"{temperature:g}" for temperature in sorted({r.temperature for r in recorded}))
        problem = f"{options.record} has no round at {options.temperature:g}; its temperatures are {has}"
        raise PolicyError("--temperature", 0, 0, problem)
    facts = {
        "algorithm": options.algorithm,
        "model": model,
        "draft": draft and str(draft),
        "source": options.record.name,
        "temperature": options.temperature,
        "versions": {"dspark-sgl": version("dspark-sgl")},
    }
    return rounds, facts, draft


def _fit(recorded: Sequence[RecordedRound], source: str, remedy: str) -> tuple[Fit, Rounds]:
    """Fitted on every second request, judged on the others, which come back too. remedy: where there are too few"""
    import numpy as np

    from .policies.sts import LEAST_SAMPLES, Rounds, fit, judge

    said = [r for r in recorded if r.confidence is not None]
    if recorded and not said:
        raise PolicyError(source, 0, 0, "its drafter gives no confidence; there is nothing to calibrate")
    names = sorted({r.rid for r in said})
    fitting = set(names[::2])
    mask = np.array([r.rid in fitting for r in said], dtype=bool)
    if min(mask.sum(), (~mask).sum()) < LEAST_SAMPLES:
        problem = f"{len(said)} rounds of {len(names)} requests are too few; each half needs {LEAST_SAMPLES}"
        raise PolicyError(source, 0, 0, f"{problem}; {remedy}")
    confidence = np.zeros((len(said), max(r.offered for r in said)))
    for row, r in zip(confidence, said, strict=True):
        row[: r.offered] = [0.0 if c is None or math.isnan(c) else c for c in r.confidence or ()]
    offered, accepted = np.array([r.offered for r in said]), np.array([r.accepted for r in said])
    rounds = Rounds.of(confidence.clip(0, 1), offered, accepted)
    mine, others = rounds.take(mask), rounds.take(~mask)
    temperatures = fit(mine)
    return Fit(
        temperatures=[round(t, 4) for t in temperatures],
        fitted_on={"requests": len(fitting), "rounds": len(mine)},
        held_out={"requests": len(names) - len(fitting), "rounds": len(others)},
        before=judge(others, [1.0]),
        after=judge(others, temperatures),
    ), others


# -- What comes of it ------------------------------------------------------------------------------------------------


def _place(draft: Path | None) -> Path:
    if draft is None or not draft.is_dir():
        raise PolicyError("--draft", 0, 0, f"{draft or 'no draft'}: no such folder; name it, or say --out FILE")
    return place_for_sts(draft)


def _write(out: Path, report: dict[str, Any]) -> None:
    """What `Calibration.from_json` reads, and where it comes from. Appears whole or not at all."""
    from .policies.calibration import VERSION

    run = report["run"]
    names = {key: Path(run[key]).name for key in ("model", "draft") if run.get(key)}
    about = {**{key: run[key] for key in ("algorithm", "source", "temperature", "versions")}, **names}
    judged = {key: report["held_out"][key] for key in ("requests", "rounds", "mean_ece_before", "mean_ece_after")}
    content = {"version": VERSION, "temperatures": report["temperatures"], "about": about, "held_out": judged}
    scratch = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(out)
    except OSError as error:
        raise PolicyError(str(out), 0, 0, f"cannot be written: {error.strerror}; name another with --out") from None


def _report(fit: Fit, facts: dict[str, Any]) -> dict[str, Any]:
    (ece_before, ece_after), (auc_before, auc_after) = fit.mean("ece"), fit.mean("auc")
    return {
        "temperatures": fit.temperatures,
        "fitted_on": fit.fitted_on,
        "held_out": {
            **fit.held_out,
            "mean_ece_before": round(ece_before, 5),
            "mean_ece_after": round(ece_after, 5),
            "mean_ece_floor": round(fit.mean("floor")[1], 5),
            "mean_auc_before": _number(auc_before),
            "mean_auc_after": _number(auc_after),
            "before": [_entry(row) for row in fit.before],
            "after": [_entry(row) for row in fit.after],
        },
        "run": facts,
    }


def _entry(row: Position) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(row).items()}


def _number(value: float) -> float | None:
    # JSON knows no NaN: the AUC of a position that was never accepted.
    return None if math.isnan(value) else round(value, 5)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _lines(fit: Fit) -> list[str]:
    fitted, held = fit.fitted_on, fit.held_out
    lines = [
        f"fitted on {fitted['rounds']} rounds of {fitted['requests']} requests; "
        f"judged on {held['rounds']} rounds of {held['requests']} others:",
        "",
        f"{'':8} {'':>8} {'':>9} {'':>11}   {'ECE of survival, %':^24}   {'AUC':^15}",
        f"{'position':8} {'samples':>8} {'accepted':>9} {'temperature':>11}   "
        f"{'before':>7} {'after':>7} {'floor':>8}   {'before':>7} {'after':>7}",
    ]
    scale = [*fit.temperatures, *[fit.temperatures[-1]] * len(fit.after)]
    for k, (raw, row, temperature) in enumerate(zip(fit.before, fit.after, scale, strict=False), 1):
        lines.append(
            f"{k:<8} {row.samples:>8} {row.accepted:>9.3f} {temperature:>11.3f}   "
            f"{100 * raw.ece:>7.2f} {100 * row.ece:>7.2f} {100 * row.floor:>8.2f}   {_cell(raw.auc)} {_cell(row.auc)}"
        )
    (before, after), (auc_before, auc_after) = fit.mean("ece"), fit.mean("auc")
    lines.append(
        f"{'mean':30} {'':>9}   {100 * before:>7.2f} {100 * after:>7.2f} {100 * fit.mean('floor')[1]:>8.2f}   "
        f"{_cell(auc_before)} {_cell(auc_after)}"
    )
    return [*lines, "floor: what a perfect prediction would show on as many samples"]


def _cell(value: float) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.3f}':>7}"


# -- The picture -----------------------------------------------------------------------------------------------------


def _plot(fit: Fit, rounds: Rounds, out: Path) -> None:
    """Reliability diagrams by position, on the held-out half."""
    import numpy as np

    from .policies.reliability import Reliability

    depth = rounds.logits.shape[1]
    columns = min(depth, 4)
    height = math.ceil(depth / columns)
    figure = new_figure("--plot", 2.5 * columns, 2.6 * height)
    arms = (("before", [1.0], "C1", fit.before), ("after", fit.temperatures, "C0", fit.after))
    panels = np.atleast_1d(figure.subplots(height, columns)).ravel()
    for k, axes in enumerate(panels):
        if k >= depth:
            axes.set_axis_off()
            continue
        known = rounds.offered > k
        for name, temperatures, colour, rows in arms:
            survival = rounds.survival(temperatures)[known, k]
            bins = Reliability.of(survival, rounds.accepted[known] > k)
            label = f"{name}: ECE {100 * rows[k].ece:.1f} %"
            axes.plot(bins.predicted, bins.observed, "o-", color=colour, markersize=3, linewidth=1, label=label)
        top = 1.05 * max(float(line.get_data()[i].max()) for line in axes.lines for i in (0, 1)) or 1.0
        axes.plot([0, top], [0, top], "--", color="gray", linewidth=0.8)
        axes.set(title=f"drafts 1 to {k + 1}" if k else "draft 1", xlim=(0, top), ylim=(0, top))
        axes.legend(fontsize="x-small", loc="upper left")
    figure.supxlabel("predicted survival", fontsize="small")
    figure.supylabel("share accepted", fontsize="small")
    save(figure, out)
