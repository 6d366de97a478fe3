"""Two data-parallel replicas behind one server: each with a policy of its own in force, both exact."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server

from . import tiny_drafts, tiny_models
from .conftest import seconds_until
from .questions import metric
from .tiny_server import tiny_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

FIXED = "version: 1\nname: fixed\nschedule: {{kind: fixed, depth: {depth}}}\n"
RANKS = ("0", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    tiny_models.write_target(folder / "target")
    tiny_drafts.write_dspark(folder / "draft")
    (folder / "policy.yaml").write_text(FIXED.format(depth=4))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    replicas, bound = ("--dp-size", "2", "--load-balance-method", "round_robin"), {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with tiny_server(folder, *replicas, environment=bound) as server:
        yield server


def test_both_replicas_follow_the_policy_and_the_target(server: Server, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "target").float().eval()
    prompts = [[1 + (index + k) % 10 for k in range(6)] for index in range(8)]
    wanted = tiny_models.greedy(model, torch.tensor(prompts), 40).tolist()

    def answers() -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            asked = pool.map(
                lambda ids: server.post("/generate", {"input_ids": ids, "sampling_params": sampling}), prompts
            )
            return [answer["output_ids"] for answer in asked]

    for depth in (4, 2):
        (folder / "policy.yaml").write_text(FIXED.format(depth=depth))
        assert answers() == wanted

        def in_force(depth: int = depth) -> bool:
            answers()
            return all(metric(server, "depth", dp_rank=rank) == depth for rank in RANKS)

        seconds_until(in_force)
    assert all(metric(server, "steps_total", dp_rank=rank, kind="round") > 0 for rank in RANKS)
