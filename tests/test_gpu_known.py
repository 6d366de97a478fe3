"""The target whose drafts are right as often as was chosen: it says what it should, and so does its draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.gpu.known import DraftSize, Size, write_draft, write_target
from dspark_sgl.drafts import check_draft, read_draft_config

SIZE = Size(256, 3, 4, 2, 64, 512, 8192)
DRAFT = DraftSize(block=7, layers=2, right=0.75, second=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="module")
def successor(folder: Path) -> Tensor:
    successor = write_target(folder / "target", SIZE)
    write_draft(folder / "draft", SIZE, DRAFT)
    return successor


def test_the_target_goes_through_all_tokens_in_one_cycle(folder: Path, successor: Tensor) -> None:
    at, seen = 0, set()
    for _ in range(SIZE.vocab_size):
        at = int(successor[at])
        seen.add(at)
    assert len(seen) == SIZE.vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.bfloat16)
    tokens = torch.randint(SIZE.vocab_size, (2, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits.argmax(-1), successor[tokens])


def test_the_draft_is_right_as_often_as_it_says(folder: Path, successor: Tensor) -> None:
    check_draft(folder / "draft", folder / "target")
    assert read_draft_config(folder / "draft").gamma == DRAFT.block
    tensors = load_file(folder / "draft/model.safetensors")
    w1, w2 = (tensors[f"markov_head.markov_w{k}.weight"].float() for k in (1, 2))
    q, choices = (w1 @ w2.T).softmax(-1).topk(2)
    for place, share in enumerate((DRAFT.right, DRAFT.second)):
        assert (choices[:, place] == successor).float().mean() == pytest.approx(share, abs=0.03)
        assert q[:, place].mean() == pytest.approx(share, abs=0.06)
    assert torch.sigmoid(tensors["confidence_head.proj.bias"].float()).item() == pytest.approx(DRAFT.right, abs=0.01)


def test_what_is_zero_takes_no_room_on_the_disk(folder: Path, successor: Tensor) -> None:
    file = (folder / "target/model.safetensors").stat()
    held = 2 * SIZE.vocab_size * SIZE.hidden_size * 2  # embedding and head, bfloat16
    assert file.st_blocks * 512 < 1.3 * held < file.st_size
