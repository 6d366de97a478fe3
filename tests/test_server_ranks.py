"""Two tensor-parallel ranks on one CPU: the same decisions on both, step after step, while the policy is edited."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dspark_sgl.server import Server

from . import tiny_models

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

STEPS = 1000
SCHEDULES = (
    "{kind: throughput}",
    "{kind: fixed, depth: 3}",
    "{kind: threshold, confidence: 0.3}",
    "{kind: table, by: batch.size, points: {1: 4, 4: 2, 6: 1}}",
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
    recorded("propose", lambda round: list(round.depths))
    recorded("observe", lambda commit: commit.positions.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_models.write_target(folder / "target")
    tiny_models.write_draft(folder / "draft")
    (folder / "recorder.py").write_text(RECORDER)
    info = folder / "recorder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recorder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nrecorder = recorder:load\n")
    write_policy(folder, SCHEDULES[0])
    return folder


def write_policy(folder: Path, schedule: str) -> None:
    (folder / "policy.yaml").write_text(f"version: 1\nname: moving\nschedule: {schedule}\n")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    arguments = [
        *("--model-path", str(folder / "target"), "--speculative-draft-model-path", str(folder / "draft")),
        *("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", str(folder / "policy.yaml")),
        *("--dtype", "float32", "--skip-tokenizer-init", "--max-total-tokens", "8192", "--max-running-requests", "16"),
        *("--tp-size", "2"),
    ]
    environment = {"PYTHONPATH": str(folder), "RECORD": str(folder), "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with Server(arguments, environment) as running:
        yield running


def test_both_ranks_decide_the_same(server: Server, folder: Path) -> None:
    def ask(index: int) -> int:
        answer = server.post(
            "/generate",
            {
                "input_ids": [1 + (index + k) % 10 for k in range(5)],
                "sampling_params": {
                    "temperature": (0.0, 1.0)[index % 2],
                    "max_new_tokens": 20 + index % 60,
                    "ignore_eos": True,
                },
            },
        )
        return len(answer["output_ids"])

    asked, recorded = 0, folder / "rank0.jsonl"
    recorded.write_text("")  # what the profile asked for at the start is not a decision
    (folder / "rank1.jsonl").write_text("")
    with ThreadPoolExecutor(8) as pool:
        while asked < 400 and recorded.read_text().count("observe") < STEPS:
            write_policy(folder, SCHEDULES[asked // 40 % len(SCHEDULES)])
            assert list(pool.map(ask, range(asked, asked + 40))) == [20 + i % 60 for i in range(asked, asked + 40)]
            asked += 40
    decisions = [(folder / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert decisions[0] == decisions[1]
    assert len(decisions[0]) >= STEPS
    assert {depth for line in decisions[0] for depth in depths(line)} >= {1, 2, 3, 4}


def depths(line: str) -> list[int]:
    name, values = json.loads(line)
    return values if name == "propose" else []
