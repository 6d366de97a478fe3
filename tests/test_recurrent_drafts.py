"""Eagle3 and MTP drafts: found for their target, read, and refused in one line that names the field or the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_sgl.drafts import DraftError, check_draft, find_draft

from .tiny_drafts import write_eagle3, write_mtp
from .tiny_models import HIDDEN, LAYERS, VOCAB

TARGET = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
WRITERS: dict[str, Callable[[Path], None]] = {"EAGLE3_SGL": write_eagle3, "MTP_SGL": write_mtp}
AT = "model.mtp_layers.0."
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def draft(folder: Path, algorithm: str, **changes: Any) -> Path:
    """A draft with some fields of its config changed; None takes a field out."""
    WRITERS[algorithm](folder)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


def refusal(folder: Path, algorithm: str, target: dict[str, int] = TARGET) -> str:
    with pytest.raises(DraftError) as caught:
        check_draft(folder, target, algorithm)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and ";" in line
    return line


@pytest.mark.parametrize("algorithm", WRITERS)
def test_a_draft_passes_and_is_found_for_its_target_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = draft(tmp_path / "dspark_sgl" / "drafts" / "mine", algorithm)
    check_draft(mine, TARGET, algorithm)
    assert find_draft(TARGET, algorithm) == mine
    for other in {*WRITERS, "DSPARK_SGL"} - {algorithm}:
        assert find_draft(TARGET, other) is None
    assert find_draft(TARGET | {"hidden_size": 2 * HIDDEN}, algorithm) is None


def test_other_spellings_pass(tmp_path: Path):
    def renamed(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        tensors["embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN)
        del tensors["t2d"]

    check_draft(with_tensors(draft(tmp_path / "e", "EAGLE3_SGL"), renamed), TARGET, "EAGLE3_SGL")

    def bundled(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)

    check_draft(with_tensors(draft(tmp_path / "m", "MTP_SGL"), bundled), TARGET, "MTP_SGL")


def test_an_eagle3_draft_may_use_the_targets_head(tmp_path: Path):
    folder = draft(tmp_path / "e", "EAGLE3_SGL")
    config = json.loads((folder / "config.json").read_text()) | {"draft_vocab_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert "has no place in a draft for eagle3" in refusal(folder, "EAGLE3_SGL")
    with_tensors(folder, lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "d2t", "t2d")])
    check_draft(folder, TARGET, "EAGLE3_SGL")


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("EAGLE3_SGL", {"eagle_config": None}, f"eagle_config.{LAYER_IDS} must be a list of layer numbers"),
        ("EAGLE3_SGL", {"eagle_config": {LAYER_IDS: [0, 2, 1]}}, f"eagle_config.{LAYER_IDS} must rise"),
        (
            "EAGLE3_SGL",
            {"eagle_config": {LAYER_IDS: [0, 1, 3]}},
            "names layer 3; of this target's 4, 0 to 2 can be read",
        ),
        ("EAGLE3_SGL", {"eagle_config": {LAYER_IDS: [0, 1]}}, "tensor fc.weight has shape [32, 96]"),
        ("EAGLE3_SGL", {"draft_vocab_size": None}, "draft_vocab_size is missing"),
        (
            "EAGLE3_SGL",
            {"draft_vocab_size": 8},
            "tensor lm_head.weight has shape [9, 32], config.json promises [8, 32]",
        ),
        ("EAGLE3_SGL", {"vocab_size": 13}, "vocab_size is 13, the target has 12"),
        ("EAGLE3_SGL", {"hidden_size": 16}, "hidden_size is 16, the target has 32"),
        ("EAGLE3_SGL", {"num_hidden_layers": 2}, "tensor layers.1.self_attn.q_proj.weight is missing"),
        (
            "EAGLE3_SGL",
            {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
            "draft for mtp; start with",
        ),
        ("MTP_SGL", {"architectures": ["LlamaForCausalLMEagle3"]}, "draft for eagle3; start with"),
        ("MTP_SGL", {"intermediate_size": 48}, f"tensor {AT.removeprefix('model.')}mlp.gate_proj.weight has shape"),
        ("MTP_SGL", {"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        (
            "MTP_SGL",
            {"num_key_value_heads": 4},
            "self_attn.k_proj.weight has shape [16, 32], config.json promises [32, 32]",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, algorithm: str, changes: dict[str, Any], words: str):
    assert words in refusal(draft(tmp_path / "d", algorithm, **changes), algorithm)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("EAGLE3_SGL", "midlayer.hidden_norm.weight"),
        ("EAGLE3_SGL", "d2t"),
        ("EAGLE3_SGL", "fc.weight"),
        ("MTP_SGL", f"{AT}input_proj.weight"),
        ("MTP_SGL", f"{AT}self_attn.q_proj.bias"),
        ("MTP_SGL", f"{AT}final_layernorm.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(tmp_path: Path, algorithm: str, name: str):
    known = name.removeprefix("model.").replace("midlayer.", "layers.0.")
    folder = with_tensors(draft(tmp_path / "d", algorithm), lambda tensors: tensors.update({name: tensors[name][:-1]}))
    assert f"tensor {known} has shape" in refusal(folder, algorithm)
    with_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"tensor {known} is missing" in refusal(folder, algorithm)


def test_a_tensor_without_a_place_is_named(tmp_path: Path):
    folder = draft(tmp_path / "d", "EAGLE3_SGL")
    with_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "tensor extra has no place in a draft for eagle3" in refusal(folder, "EAGLE3_SGL")


@pytest.mark.parametrize(("offset", "words"), [(20, "outside the vocabulary of 12"), (1, "names a token twice")])
def test_a_draft_vocabulary_must_be_one(tmp_path: Path, offset: int, words: str):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["d2t"][0] += offset  # column 0 is token 1, column 1 token 2

    assert words in refusal(with_tensors(draft(tmp_path / "d", "EAGLE3_SGL"), change), "EAGLE3_SGL")


def test_a_hot_vocabulary_must_be_one(tmp_path: Path):
    folder = draft(tmp_path / "d", "MTP_SGL")
    (folder / "hot_vocab.json").write_text("[1, 1]")
    assert "names a token twice" in refusal(folder, "MTP_SGL")


@pytest.mark.parametrize("algorithm", WRITERS)
def test_truncated_weights_and_missing_files_are_refused(tmp_path: Path, algorithm: str):
    folder = draft(tmp_path / "d", algorithm)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refusal(folder, algorithm)
    file.unlink()
    assert "model.safetensors: missing" in refusal(folder, algorithm)
    (folder / "config.json").unlink()
    assert "config.json: missing" in refusal(folder, algorithm)
