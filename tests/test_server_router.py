"""Two servers behind SGLang's router: the answers are right, and both speculate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server

from . import tiny_drafts, tiny_models
from .tiny_server import tiny_server

pytest.importorskip("sglang_router")
pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

TOKENS = 40


class Router(Server):
    """Started otherwise than a server, and asked as one."""

    def __init__(self, workers: Sequence[Server]) -> None:
        super().__init__([])
        self._command = [
            *(sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--worker-urls", *(worker.url for worker in workers), "--policy", "round_robin"),
            *("--prometheus-port", str(Server([]).port)),  # a free one; its own choice may be another router's
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    tiny_models.write_target(folder / "target")
    tiny_drafts.write_dspark(folder / "draft")
    (folder / "policy.yaml").write_text("version: 1\nname: fixed\nschedule: {kind: fixed, depth: 4}\n")
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(tiny_server(folder)) for _ in range(2)]


@pytest.fixture(scope="module")
def router(workers: list[Server]) -> Iterator[Server]:
    with Router(workers) as router:
        yield router


def test_answers_are_the_targets_and_both_servers_speculate(
    router: Server, workers: list[Server], folder: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "target").float().eval()
    prompts = [[1 + (index + k) % 10 for k in range(6)] for index in range(8)]
    wanted = tiny_models.greedy(model, torch.tensor(prompts), TOKENS).tolist()
    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(
            lambda ids: router.generate(ids, temperature=0, max_new_tokens=TOKENS, ignore_eos=True), prompts
        )
        answers = [list(answer.tokens) for answer in asked]
    assert answers == wanted
    assert all(worker.report()["counts"]["round"] > 0 for worker in workers)
