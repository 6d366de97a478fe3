"""`dspark-sgl top`: a running server's speculation, live in the terminal, from its `/metrics`.

Every figure is of the last interval. Asks nothing but `/metrics`, and changes nothing on the server.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence

from .policies.errors import PolicyError
from .scrape import Scrape, Span

HELP = "watch a running server"

BARS = " ▁▂▃▄▅▆▇█"
HISTORY = 60
"""Intervals that the sparklines go back."""
WHOLE_STEPS = ("round", "plain", "prefill")
"""In `phase_seconds` beside the parts of a step: they are not parts."""
CLEAR, HIDE, SHOW = "\x1b[H\x1b[2J", "\x1b[?25l", "\x1b[?25h"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds (default: %(default)g)")
    parser.add_argument("--once", action="store_true", help="print one interval and end")


def run(options: argparse.Namespace) -> int:
    if not 0.1 <= options.interval <= 3600:
        raise PolicyError("--interval", 0, 0, f"must be 0.1 to 3600 seconds, not {options.interval:g}")
    live = sys.stdout.isatty() and not options.once
    speeds: deque[float] = deque(maxlen=HISTORY)
    depths: deque[float] = deque(maxlen=HISTORY)
    before = scrape(options.url)
    with contextlib.ExitStack() as stack:
        if live:
            print(HIDE, end="")
            stack.callback(print, SHOW, end="", flush=True)
        while True:
            time.sleep(options.interval)
            after = scrape(options.url)
            span = Span(before, after)
            speeds.append(span.rate("dspark_emitted_tokens_total"))
            depths.append(depth(span))
            # A longer line would wrap and push the screen down; a file or a pipe gets all of it.
            width = shutil.get_terminal_size().columns if live else None
            lines = [line[:width] for line in frame(options.url, span, speeds, depths)]
            print((CLEAR if live else "") + "\n".join(lines), flush=True)
            if options.once:
                return 0
            before = after


def scrape(url: str) -> Scrape:
    """Raises PolicyError where no server of ours answers there."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/metrics", timeout=10) as response:
            found = Scrape.of(response.read().decode(), time.monotonic())
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise PolicyError(
            url, 0, 0, f"no metrics there ({reason}); is the server running, and --url its own?"
        ) from None
    if "dspark_policy" not in found.series:
        raise PolicyError(url, 0, 0, "a server without dspark; start it with --speculative-algorithm DSPARK_SGL")
    return found


# -- What is shown -----------------------------------------------------------------------------------------------------


def depth(span: Span) -> float:
    """Draft tokens verified per request and step, plain steps included."""
    drafted = span.grown("dspark_draft_tokens_total")
    emitted_first = span.grown("dspark_emitted_tokens_total") - span.grown("dspark_tokens_saved_total")
    return drafted / emitted_first if emitted_first > 0 else 0.0


def frame(url: str, span: Span, speeds: Sequence[float], depths: Sequence[float]) -> list[str]:
    """The screen, line by line."""
    now = span.after
    running, queue = now.total("sglang:num_running_reqs"), now.total("sglang:num_queue_reqs")
    emitted = span.rate("dspark_emitted_tokens_total")
    steps = span.grown("dspark_steps_total")
    plain = span.grown("dspark_steps_total", kind="plain")
    accepted = span.grown("dspark_draft_tokens_total", outcome="accepted")
    drafted = span.grown("dspark_draft_tokens_total")
    each = emitted / running if running else None
    lines = [
        f"dspark-sgl top   {url}   policy {_policy(now)}, rule {now.greatest('dspark_active_rule') or 0:.0f}   "
        f"last {span.seconds:.1f} s",
        "",
        _row(
            "requests",
            [("running", _n(running)), ("queued", _n(queue)), ("KV used", _share(now.greatest("sglang:token_usage")))],
        ),
        _row("tokens/s", [("all", f"{emitted:.1f}"), ("each", _n(each, 1))]) + "  " + sparkline(speeds),
        _row("depth", [("mean", f"{depths[-1] if depths else 0:.2f}")]) + "  " + sparkline(depths),
        _row("steps", [("per s", f"{steps / span.seconds:.1f}"), ("plain", _share(plain / steps if steps else None))]),
        _row(
            "drafts",
            [
                ("verified/s", f"{drafted / span.seconds:.1f}"),
                ("accepted", _share(accepted / drafted if drafted else None)),
                ("length", _n(span.ratio("dspark_accepted_length_sum", "dspark_accepted_length_count"), 2)),
            ],
        ),
        _row(
            "predicted / observed",
            [
                ("drafts accepted", _over(span, "dspark_survival")),
                ("step time", _over(span, "dspark_step_seconds")),
            ],
        ),
        _row("ms per step", _phases(span, steps)),
    ]
    refused = now.total("dspark_policy_reloads_total", result="refused") or 0
    bad = (now.total("dspark_bad_confidences_total") or 0) + (now.total("dspark_unsound_drafts_total") or 0)
    if refused:
        lines.append(f"! {refused:.0f} saved versions of the policy were refused; the log says why")
    if bad:
        lines.append(f"! {bad:.0f} drafts came with NaN and were not verified; check the draft's checkpoint")
    if now.greatest("dspark_cost_ready") == 0:
        lines.append("! no step has been measured yet: schedules go without a cost curve")
    return lines


def sparkline(values: Sequence[float]) -> str:
    """A bar per value, the highest at full height."""
    top = max(values, default=0.0)
    if top <= 0:
        return ""
    return "".join(BARS[round(max(0.0, value) / top * (len(BARS) - 1))] for value in values)


def _row(name: str, cells: Sequence[tuple[str, str]]) -> str:
    return f"{name:21}" + "   ".join(f"{label} {value:>6}" for label, value in cells)


def _phases(span: Span, steps: float) -> list[tuple[str, str]]:
    grown = span.grown_by("dspark_phase_seconds_total", "phase")
    parts = {phase: seconds for phase, seconds in grown.items() if phase not in WHOLE_STEPS and seconds > 0}
    return [(phase, f"{1000 * seconds / steps:.1f}") for phase, seconds in parts.items()] if steps else [("-", "")]


def _policy(now: Scrape) -> str:
    current = [dict(labels) for labels, value in now.series.get("dspark_policy", {}).items() if value == 1]
    return f"{current[0]['name']} ({current[0]['digest'][:8]})" if current else "-"


def _over(span: Span, name: str) -> str:
    return _n(span.ratio(f"{name}_predicted_total", f"{name}_observed_total"), 2)


def _n(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
