"""Runs prompts through a real server, started as a user would, and hands back its verify rounds: for `bench accept` and
`calibrate`.

The rounds come from the server's own record (recorder.py), so they are exact whatever the policy does; where
DSPARK_RECORD is set they also stay there. Requests go to the chat endpoint, so the model's chat template is applied as
to a user's. Never judges what it collects.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from .launch import check_choice, demo_target, ended, from_anywhere, policy_from_anywhere
from .policies.errors import PolicyError
from .prompts import Prompt
from .recorder import RecordedRound, read_record
from .server import Server, ServerError
from .settings import RECORD_VARIABLE, record_file

AT_ONCE = 16
"""Requests in flight. What a round accepts does not depend on it."""
FULL_BLOCK = "{version: 1, name: full-block, schedule: {kind: fixed, depth: 64}, calibration: {method: none}}\n"
"""Every draft of every block is offered, since a depth is cut to the drafter's block; confidence decides nothing."""


class Collector:
    """`with Collector(options) as collector:` is a server of these options that records; default policy: full block."""

    def __init__(self, options: argparse.Namespace, policy: str | None = None) -> None:
        model = options.model or demo_target()
        check_choice(options.algorithm, model, options.draft)
        self._folder = Path(tempfile.mkdtemp(prefix="dspark-record-"))
        self._record = (record_file() or self._folder / "rounds.jsonl").absolute()
        (self._folder / "full-block.yaml").write_text(FULL_BLOCK)
        arguments = ["--model-path", from_anywhere(model), "--speculative-algorithm", options.algorithm.upper()]
        arguments += ["--dspark-policy", policy_from_anywhere(policy or str(self._folder / "full-block.yaml"))]
        if options.draft:
            arguments += ["--speculative-draft-model-path", from_anywhere(options.draft)]
        self._tokens = options.max_new_tokens
        self._run, self._asked = secrets.token_hex(4), 0
        self._server = Server([*arguments, *options.sglang], {RECORD_VARIABLE: str(self._record)})

    def __enter__(self) -> Collector:
        print("Starting SGLang (about a minute) ...", file=sys.stderr, flush=True)
        try:
            self._server.__enter__()
        except BaseException as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if isinstance(error, ServerError):
                raise ended(self._server, error) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, prompts: Sequence[Prompt], temperature: float, label: str) -> list[list[RecordedRound]]:
        """The rounds of each prompt's answer, in order. label: beside the progress bar"""
        from tqdm import tqdm

        names = [f"{self._run}-{self._asked + index:06}" for index in range(len(prompts))]
        self._asked += len(prompts)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            work = pool.map(lambda name, prompt: self._ask(name, prompt, temperature), names, prompts)
            for _ in tqdm(work, desc=label, total=len(prompts), unit="prompt"):
                pass
        finally:
            # After a Ctrl-C nobody waits for answers that are under way: the server ends next.
            pool.shutdown(wait=False, cancel_futures=True)
        found: dict[str, list[RecordedRound]] = {name: [] for name in names}
        for round_ in read_record(self._record) if self._record.exists() else ():
            if round_.rid in found:
                found[round_.rid].append(round_)
        return list(found.values())

    def facts(self) -> dict[str, Any]:
        """What was run, for reports."""
        info = self._server.get("/server_info")
        return {
            "algorithm": info["speculative_algorithm"],
            "model": info["model_path"],
            "draft": info["speculative_draft_model_path"],
            "policy": self._server.report()["policy"],
            "versions": {name: version(name) for name in ("dspark-sgl", "sglang", "torch")},
        }

    def _ask(self, name: str, prompt: Prompt, temperature: float) -> None:
        # Said in full: a model's generation_config.json would fill in what is not.
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        messages = [{"role": "user", "content": prompt.text}]
        body = {"model": "default", "rid": name, "messages": messages, "max_tokens": self._tokens, **sampling}
        try:
            self._server.post("/v1/chat/completions", body)
        except ServerError as error:
            raise PolicyError("server", 0, 0, f"prompt {prompt.text[:40]!r}: {error}") from None
        except (OSError, HTTPException):
            raise ended(self._server) from None
