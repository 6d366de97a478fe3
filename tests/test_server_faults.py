"""What goes wrong at run time: a draft model that returns NaN, new weights, a scheduler that is killed under load.

The draft is that of the tiny target, whose Markov head returns NaN after one of the twelve tokens while its confidence
head, which does not read that token, goes on promising: logits of NaN must not pass for a distribution. Nothing of it
is verified, every answer stays the target's, and the server says so.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server, ServerError

from . import tiny_drafts, tiny_models
from .questions import metric
from .sampling import Sampling
from .three_tokens import exact, p_value
from .tiny_server import tiny_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

AFTER = 5
CHAINS = "version: 1\nschedule: {kind: fixed, depth: 4}\naccept: {method: rejection}\n"
TREES = "version: 1\nschedule: {kind: fixed, depth: 4}\nshape: {kind: tree, max_nodes: 14, branch: 4}\n"
PROMPT = [7, 1, AFTER, 3] * 5 + [AFTER]
REQUESTS, EACH = 20, 250


def write_broken_draft(folder: Path) -> None:
    tiny_drafts.write_dspark(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["markov_head.markov_w1.weight"][AFTER] = torch.nan
    weight = tensors["confidence_head.proj.weight"]
    tensors["confidence_head.proj.weight"] = weight[:, : tiny_models.HIDDEN].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"confidence_head_with_markov": False}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_models.write_target(folder / "target")
    write_broken_draft(folder / "draft")
    (folder / "policy.yaml").write_text(CHAINS)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with tiny_server(folder, "--max-running-requests", str(EACH)) as server:
        yield server


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "target").float().eval()


def ask(server: Server, **sampling: Any) -> Any:
    sampling = {"ignore_eos": True, **sampling}
    return server.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})


def greedy(model: LlamaForCausalLM, count: int) -> list[int]:
    """What the target writes after PROMPT."""
    written: list[int] = tiny_models.greedy(model, torch.tensor([PROMPT]), count)[0].tolist()
    return written


@pytest.mark.parametrize("policy", [CHAINS, TREES], ids=["chains", "trees"])
def test_answers_stay_the_targets(server: Server, folder: Path, model: LlamaForCausalLM, policy: str) -> None:
    server.edit_policy(folder / "policy.yaml", policy)

    def bad() -> float:
        return metric(server, "unsound_drafts_total") + metric(server, "bad_confidences_total")

    known, accepted = bad(), metric(server, "draft_tokens_total", outcome="accepted")
    assert ask(server, temperature=0, max_new_tokens=48)["output_ids"] == greedy(model, 48)
    drawn = [ask(server, n=EACH, temperature=1.0, max_new_tokens=3) for _ in range(REQUESTS)]
    counts = Counter(tuple(answer["output_ids"]) for answers in drawn for answer in answers)
    assert p_value(counts, exact(model, PROMPT, Sampling())) > 1e-4
    assert bad() > known
    assert metric(server, "draft_tokens_total", outcome="accepted") > accepted, "where there are numbers, it drafts"


def test_the_log_says_so_and_does_not_repeat_itself(server: Server) -> None:
    """A line whenever the drafts are ten times as many."""
    assert 1 <= server.log.count("the draft has returned NaN") <= 8


WRONG: list[Any] = [
    *([], 3, "x", True, [[[[[]]]]], {"": 1}, {"max_depth": 2**63}, {"max_depth": -(2**63)}, {"max_depth": 1e300}),
    *(
        {"max_depth": [1] * 10_000},
        {"max_depth": {"max_depth": 1}},
        {"tier": ""},
        {"tier": "\x00"},
        {"tier": "x" * 10**6},
    ),
    *({"tier": ["a"] * 10_000}, {"tier": {}, "max_depth": 1}, {"max_depth": 1, "more": None}),
]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_wrong_wish_is_a_400_and_the_server_lives_on(server: Server, value: Any) -> None:
    with pytest.raises(ServerError, match=r"^400.*custom_params\.dspark"):
        ask(server, max_new_tokens=2, custom_params={"dspark": value})
    assert ask(server, max_new_tokens=2, custom_params={"dspark": {"max_depth": 1}})["output_ids"]


def test_new_weights_are_followed(server: Server, folder: Path, model: LlamaForCausalLM) -> None:
    """The target's; its draft, made for others, goes on drafting."""
    other = tiny_models.write_target(folder / "other", seed=1)
    for name, weights in (("other", other), ("target", model)):
        server.post("/update_weights_from_disk", {"model_path": str(folder / name)})
        rounds = metric(server, "steps_total", kind="round")
        assert ask(server, temperature=0, max_new_tokens=48)["output_ids"] == greedy(weights, 48)
        assert metric(server, "steps_total", kind="round") > rounds
    assert greedy(other, 48) != greedy(model, 48)


def test_a_killed_scheduler_ends_its_server(server: Server) -> None:
    """No client waits for ever, and nothing is left that the next server would find in its way."""
    pid = server.pid
    assert pid is not None
    family = psutil.Process(pid).children(recursive=True)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, server, temperature=1.0, max_new_tokens=200) for _ in range(16)]
        time.sleep(0.5)
        next(process for process in family if "scheduler" in process.name()).kill()
        assert server.wait(60) != 0
        assert any(future.exception(timeout=60) is not None for future in waiting)
    assert psutil.wait_procs(family, timeout=20)[1] == []
