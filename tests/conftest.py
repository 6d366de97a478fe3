"""How the tests share a machine, and the servers they share: a start costs most of a minute.

`make test` runs two workers, each with a core of its own: threads of two servers on two cores would wait for one
another. A file is run by one of them, and so is all that asks the real model's servers; the longest come first.

float32, so that greedy outputs can be compared token for token; chunks of 64 tokens and a small KV pool, so that
chunked prefill and radix eviction happen on the way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; servers inherit it

import pytest
import triton_interpreter  # noqa: F401  before anything imports triton

from dspark_sgl.server import Answer, Server
from dspark_sgl.settings import RECORD_VARIABLE
from dspark_sgl.target import chat, make_target

from .questions import shaped, together

PROMPTS = Path(__file__).parent.parent / "bench" / "prompts" / "eval.jsonl"
SHARED = (
    *("--dtype", "float32", "--chunked-prefill-size", "64", "--context-length", "384"),
    *("--max-total-tokens", "3000", "--max-running-requests", "16", "--log-level", "info"),
    # Ready is who answered a request, and `Server` waits for that.
    "--skip-server-warmup",
)
FULL_BLOCK = "version: 1\nname: full-block\nschedule: {kind: fixed, depth: 7}\n"


REAL = ("test_server", "test_server_stops", "test_server_trees", "test_server_commands", "test_server_policy")
"""The files that ask `plain_server` and `spec_server`."""
LONGEST_FIRST = ("test_server_algorithms", *REAL, "test_server_ranks", "test_server_replicas", "test_server_faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        stem = item.path.stem
        return LONGEST_FIRST.index(stem) if stem in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # pytest may run without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return "real model" if stem in REAL else stem

    return ByServer(config, log)


@pytest.fixture(scope="session")
def target() -> Path:
    return make_target()


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `spec_server` records its verify rounds."""
    return tmp_path_factory.mktemp("record") / "rounds.jsonl"


@pytest.fixture(autouse=True)
def _small_numbers_are_numbers() -> None:
    """Our CPU platform has its process flush denormals, a test that loads it among them; Hypothesis refuses that."""
    import torch  # not before the interpreter above

    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of `spec_server`. Whoever edits it puts it back."""
    file = tmp_path_factory.mktemp("policy") / "edited.yaml"
    file.write_text(FULL_BLOCK)
    return file


@pytest.fixture(scope="session")
def spec_server(target: Path, policy: Path, record: Path) -> Iterator[Server]:
    """DSpark at the full block; a request lowers its own depth with `max_depth`, a policy drafts trees of up to 32."""
    speculate = ["--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", str(policy)]
    speculate += ["--speculative-num-draft-tokens", "33"]
    with Server(["--model-path", str(target), *SHARED, *speculate], {RECORD_VARIABLE: str(record)}) as server:
        yield server


@pytest.fixture(scope="session")
def plain_server(target: Path) -> Iterator[Server]:
    """SGLang without speculation, on the same attention backend."""
    # Synchronous as ours is: overlapped, SGLang counts a token for the penalties one step late.
    with Server(["--model-path", str(target), *SHARED, "--disable-overlap-schedule"]) as server:
        yield server


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twelve evaluation prompts, four of each domain, as the chat template renders them."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    chosen = [row for domain in ("math", "code", "chat") for row in [r for r in rows if r["domain"] == domain][:4]]
    return [chat(row["prompt"]) for row in chosen]


@pytest.fixture(scope="session")
def plain_answers(plain_server: Server, prompts: list[str]) -> list[Answer]:
    return together(plain_server, prompts, temperature=0, max_new_tokens=64)


@pytest.fixture(scope="session")
def plain_shaped(plain_server: Server) -> dict[str, tuple[int, ...]]:
    return shaped(plain_server)


def seconds_until(condition: Callable[[], bool], limit: float = 20) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit, f"not so after {limit} s"
        time.sleep(0.02)
    return time.monotonic() - start
