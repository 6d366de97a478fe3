"""Two tensor-parallel ranks on one CPU: the same decisions on both, step after step, while the policy is edited."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server

from . import tiny_drafts, tiny_models
from .conftest import seconds_until
from .tiny_server import tiny_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

STEPS, LONGEST = 300, 79
POLICIES = (
    "schedule: {kind: throughput}",
    "schedule: {kind: fixed, depth: 3}",
    "schedule: {kind: threshold, confidence: 0.3}",
    "schedule: {kind: table, by: batch.size, points: {1: 4, 4: 2, 6: 1}}",
    "schedule: {kind: fixed, nodes: 8}\nshape: {kind: tree, max_nodes: 12, branch: 3}",
    "schedule: {kind: fixed, nodes: 4}\nshape: {kind: tree, max_nodes: 6, branch: 2}",
    "schedule: {kind: throughput}\nshape: {kind: auto, max_nodes: 15}",
)

# A plugin beside ours that writes down, in each rank's process, what the drafter is asked for and what is committed.
RECORDER = """
import json, os
from dspark_sgl.spec_algos.dspark import DSparkDrafter
from sglang.srt.runtime_context import get_parallel

def load():
    def recorded(name, values):
        method = getattr(DSparkDrafter, name)
        def wrapper(self, argument):
            with open(os.path.join(os.environ["RECORD"], f"rank{get_parallel().tp_rank}.jsonl"), "a") as file:
                file.write(json.dumps([name, values(argument)]) + "\\n")
            return method(self, argument)
        setattr(DSparkDrafter, name, wrapper)
    recorded("propose", lambda round: [list(round.depths), round.tree and [round.tree.max_nodes, round.tree.branch]])
    recorded("observe", lambda commit: commit.positions.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_models.write_target(folder / "target")
    tiny_drafts.write_dspark(folder / "draft")
    (folder / "recorder.py").write_text(RECORDER)
    info = folder / "recorder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recorder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nrecorder = recorder:load\n")
    (folder / "policy.yaml").write_text(policy_text(POLICIES[0]))
    return folder


def policy_text(policy: str) -> str:
    return f"version: 1\nname: moving\n{policy}\n"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    environment = {"RECORD": str(folder), "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with tiny_server(folder, "--tp-size", "2", environment=environment) as running:
        yield running


def test_both_ranks_decide_the_same(server: Server, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "target").float().eval()
    wanted = tiny_models.greedy(model, torch.tensor([prompt(index) for index in range(10)]), LONGEST).tolist()

    def ask(index: int) -> None:
        """Every other request samples; what is greedy is known."""
        count, greedy = LONGEST - index % 60, index % 20 < 10
        sampling = {"temperature": 0.0 if greedy else 1.0, "max_new_tokens": count, "ignore_eos": True}
        answer = server.post("/generate", {"input_ids": prompt(index), "sampling_params": sampling})["output_ids"]
        assert len(answer) == count
        assert not greedy or answer == wanted[index % 10][:count]

    records = [folder / f"rank{rank}.jsonl" for rank in (0, 1)]
    for record in records:
        record.write_text("")  # what the profile asked for at the start is not a decision
    asked = 0
    with ThreadPoolExecutor(8) as pool:
        while records[0].read_text().count("observe") < STEPS or asked < 40 * len(POLICIES):
            server.edit_policy(folder / "policy.yaml", policy_text(POLICIES[asked // 40 % len(POLICIES)]))
            list(pool.map(ask, range(asked, asked + 40)))
            asked += 40
            assert asked <= 400, "so many requests are more steps than that"
    seconds_until(lambda: len({record.read_text().count("\n") for record in records}) == 1)
    decisions = [record.read_text().splitlines() for record in records]
    assert decisions[0] == decisions[1]
    proposals = [values for name, values in map(json.loads, decisions[0]) if name == "propose"]
    assert {depth for depths, tree in proposals if not tree for depth in depths} >= {1, 2, 3, 4}
    assert {tuple(tree) for _, tree in proposals if tree} >= {(12, 3), (6, 2)}


def prompt(index: int) -> list[int]:
    return [1 + (index + k) % 10 for k in range(5)]
