"""The servers the tests share: one start per configuration, because a start costs most of a minute.

Most of that minute one process imports; so a server starts in the background, beside the tests that need none and
beside other servers.

float32, so that greedy outputs can be compared token for token; chunks of 64 tokens and a small KV pool, so that
chunked prefill, radix eviction and retraction happen on the way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import triton_interpreter  # noqa: F401  before anything imports triton

from dspark_sgl.server import Answer, Server
from dspark_sgl.settings import RECORD_VARIABLE
from dspark_sgl.target import make_target

from .questions import chat, shaped, together

PROMPTS = Path(__file__).parent.parent / "bench" / "prompts" / "eval.jsonl"
SHARED = (
    *("--dtype", "float32", "--chunked-prefill-size", "64", "--context-length", "384"),
    *("--max-total-tokens", "3000", "--max-running-requests", "16", "--log-level", "info"),
    # Ready is who answered a request, and `Server` waits for that.
    "--skip-server-warmup",
)
FULL_BLOCK = "version: 1\nname: full-block\nschedule: {kind: fixed, depth: 7}\n"


class Boots:
    """Servers by name, each started in a thread of its own and waited for where it is used."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._ready: dict[str, Future[Server]] = {}
        self._threads = ThreadPoolExecutor()

    def start(self, name: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Nothing happens where it is under way already."""
        if name not in self._servers:
            server = self._servers[name] = Server(arguments, environment)
            self._ready[name] = self._threads.submit(server.__enter__)

    def server(self, name: str) -> Server:
        return self._ready[name].result()

    def stop(self, name: str) -> None:
        self._servers[name].stop()

    def stop_all(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._threads.shutdown()


@pytest.fixture(scope="session")
def target() -> Path:
    return make_target()


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `spec_server` records its verify rounds."""
    return tmp_path_factory.mktemp("record") / "rounds.jsonl"


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of `spec_server`. Whoever edits it puts it back."""
    file = tmp_path_factory.mktemp("policy") / "edited.yaml"
    file.write_text(FULL_BLOCK)
    return file


@pytest.fixture(scope="session", autouse=True)
def boots(request: pytest.FixtureRequest) -> Iterator[Boots]:
    """Two servers start with the first test, if any test is going to ask for them."""
    boots = Boots()
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    try:
        if asked & {"spec_server", "plain_server"}:
            shared = ["--model-path", str(request.getfixturevalue("target")), *SHARED]
        if "spec_server" in asked:
            speculate = ["--speculative-algorithm", "DSPARK_SGL", "--dspark-policy"]
            record = {RECORD_VARIABLE: str(request.getfixturevalue("record"))}
            boots.start("spec", [*shared, *speculate, str(request.getfixturevalue("policy"))], record)
        if "plain_server" in asked:
            # Synchronous as ours is: overlapped, SGLang counts a token for the penalties one step late.
            boots.start("plain", [*shared, "--disable-overlap-schedule"])
        yield boots
    finally:
        boots.stop_all()


@pytest.fixture(scope="session")
def spec_server(boots: Boots) -> Server:
    """DSpark at the full block; a request lowers its own depth with `max_depth`."""
    return boots.server("spec")


@pytest.fixture(scope="session")
def plain_server(boots: Boots) -> Server:
    """SGLang without speculation, on the same attention backend."""
    return boots.server("plain")


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
