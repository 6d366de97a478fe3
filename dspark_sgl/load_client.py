"""One load on one server, driven by SGLang's own `bench_serving` client, and what the server did meanwhile.

The client runs in this process, by its command line: a process of its own would import SGLang again for every point.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .policies.errors import PolicyError
from .prompts import Prompt
from .server import Server


@dataclass(frozen=True)
class Load:
    """concurrency: so many users, each of whom asks again when answered; or rate: requests a second, at random times"""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        return f"{self.concurrency} users" if self.rate is None else f"{self.rate:g} requests/s"


def by_load(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The points of a report under each load, with its label."""
    for load in dict.fromkeys(Load(point["concurrency"], point["rate"]) for point in points):
        yield load.label, [p for p in points if Load(p["concurrency"], p["rate"]) == load]


@dataclass(frozen=True)
class Served:
    """What one load brought.

    output_tps: output tokens per second; tps_per_user: of one request after its first token, median
    ttft_ms, itl_ms: percentiles 50, 90 and 99 of time to first token and between tokens
    depth: drafts verified per request and step; plain: share of request-steps without any; accepted_length: tokens per
        request and round, None where nobody speculated; accepted: rounds by how many tokens they emitted
    reliability: of the survival that drafts were verified for, see `policies.reliability.Tally`
    """

    output_tps: float
    tps_per_user: float
    ttft_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]
    depth: float
    plain: float
    accepted_length: float | None
    accepted: dict[int, int]
    reliability: dict[str, list[float]]


def answer_length(place: int, tokens: int) -> int:
    """Of the prompt at this place: between half and one and a half times `tokens`, always the same.

    Answers of one length would all end at once, and the prompts after them be prefilled as one batch: a load that no
    server sees.
    """
    return max(2, round(tokens * random.Random(place).uniform(0.5, 1.5)))


def write_dataset(prompts: Sequence[Prompt], tokens: int, file: Path) -> None:
    """In the client's format, a conversation of two turns a line: the second is as long as the answer shall be."""
    with file.open("w") as out:
        for place, prompt in enumerate(prompts):
            answer = " ".join(["so"] * answer_length(place, tokens))  # a token each, in the tokenizers that we know
            turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"conversations": turns}) + "\n")


def serve(server: Server, model: str, dataset: Path, load: Load, requests: int, seed: int) -> Served:
    """Drives so many requests; the seed says which prompts. Raises PolicyError where one fails."""
    before = _Counts.of(server)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.jsonl"
        _client(
            *("--backend", "sglang", "--base-url", server.url, "--model", model, "--tokenizer", model),
            *("--dataset-name", "custom", "--dataset-path", str(dataset), "--apply-chat-template"),
            *("--num-prompts", str(requests), "--seed", str(seed)),
            *("--request-rate", "inf" if load.rate is None else str(load.rate)),
            *(() if load.concurrency is None else ("--max-concurrency", str(load.concurrency))),
            *("--warmup-requests", "0", "--flush-cache", "--disable-tqdm", "--output-details"),
            *("--output-file", str(out)),
        )
        result = json.loads(out.read_text())
    failed = [error for error in result["errors"] if error]
    if failed or result["completed"] != requests:
        why = failed[0] if failed else "no answer"
        raise PolicyError(load.label, 0, 0, f"{requests - result['completed']} of {requests} requests failed: {why}")
    return _Counts.of(server).since(before, result)


@dataclass(frozen=True)
class _Counts:
    """A server's own, since its start; all 0 for plain SGLang. steps: drafts a round, of SGLang's own algorithms"""

    counts: dict[str, int]
    accepted: dict[int, int]
    reliability: dict[str, list[float]]
    steps: int

    @classmethod
    def of(cls, server: Server) -> _Counts:
        info = server.get("/server_info")
        report = info["internal_states"][0].get("dspark", {})
        histogram = {int(length): n for length, n in report.get("accepted_histogram", {}).items()}
        steps = 0 if report else int(info.get("speculative_num_steps") or 0)
        return cls(report.get("counts", {}), histogram, report.get("reliability", {}), steps)

    def since(self, before: _Counts, result: dict[str, Any]) -> Served:
        done = {key: count - before.counts.get(key, 0) for key, count in self.counts.items()}
        accepted = {n: count - before.accepted.get(n, 0) for n, count in self.accepted.items()}
        steps = done.get("round_requests", 0) + done.get("plain_requests", 0)
        rounds = done.get("request_rounds", 0)
        # Of SGLang's own no more is known than it tells its client: the mean since its start.
        theirs = result.get("accept_length") if self.steps else None
        return Served(
            output_tps=float(result["output_throughput"]),
            tps_per_user=1000 / float(result["median_tpot_ms"]),
            ttft_ms=_percentiles(result, "ttft"),
            itl_ms=_percentiles(result, "itl"),
            depth=done.get("drafted", 0) / steps if steps else float(self.steps),
            plain=done.get("plain_requests", 0) / steps if steps else float(not self.steps),
            accepted_length=done.get("emitted", 0) / rounds if rounds else theirs,
            accepted={n: count for n, count in sorted(accepted.items()) if count},
            reliability={
                name: [now - then for now, then in zip(sums, before.reliability[name], strict=True)]
                for name, sums in self.reliability.items()
            },
        )


def _percentiles(result: dict[str, Any], what: str) -> tuple[float, float, float]:
    return float(result[f"median_{what}_ms"]), float(result[f"p90_{what}_ms"]), float(result[f"p99_{what}_ms"])


def _client(*arguments: str) -> None:
    """What `python -m sglang.bench_serving` does; its report is only shown where it ends with an error."""
    from sglang.benchmark.serving import cli_main  # half a minute of imports, once

    said = io.StringIO()
    own, sys.argv = sys.argv, ["bench_serving", *arguments]
    try:
        with contextlib.redirect_stdout(said):
            cli_main()
    except SystemExit as error:
        if error.code:
            raise PolicyError("bench_serving", 0, 0, said.getvalue()[-300:]) from None
    finally:
        sys.argv = own
