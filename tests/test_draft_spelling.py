"""Every published spelling of a draft's config ends as the one SGLang's model classes read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspark_sgl.draft_spelling import as_sglang_reads_it
from dspark_sgl.drafts import read_draft_config

from .draft_checkpoints import CONFIG, DEEPSPEC_DFLASH, DFLASH, dflash_tensors, write_draft

OWN = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
PREFIXED = {
    "block_size": "dspark_block_size",
    "mask_token_id": "dspark_noise_token_id",
    "target_layer_ids": "dspark_target_layer_ids",
    "markov_rank": "dspark_markov_rank",
    "markov_head_type": "dspark_markov_head_type",
}


def nested(section: str) -> dict[str, Any]:
    outer = {key: value for key, value in CONFIG.items() if key not in OWN}
    return {**outer, section: {key: CONFIG[key] for key in OWN}}


def prefixed() -> dict[str, Any]:
    return {PREFIXED.get(key, key): value for key, value in CONFIG.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_flat_config_is_served_from_where_it_is(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    assert as_sglang_reads_it(draft) == draft


@pytest.mark.parametrize("config", [nested("dflash_config"), nested("dspark_config"), prefixed()])
def test_another_spelling_is_flattened_beside_links_to_the_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    draft = write_draft(tmp_path / "draft", config)
    folder = as_sglang_reads_it(draft)
    flat = json.loads((folder / "config.json").read_text())
    assert {key: flat[key] for key in OWN} == {key: CONFIG[key] for key in OWN}
    assert (folder / "model.safetensors").resolve() == (draft / "model.safetensors").resolve()
    assert json.loads((draft / "config.json").read_text()) == config, "the checkpoint itself was changed"
    assert as_sglang_reads_it(draft) == folder
    assert read_draft_config(folder).markov_rank == CONFIG["markov_rank"]


def test_a_dflash_draft_is_served_from_where_it_is(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", DFLASH, dflash_tensors())
    assert as_sglang_reads_it(draft) == draft


def test_deepspecs_dflash_becomes_what_sglang_has_a_class_for(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", DEEPSPEC_DFLASH, dflash_tensors())
    before, folder = read_draft_config(draft), as_sglang_reads_it(draft)
    flat, after = json.loads((folder / "config.json").read_text()), read_draft_config(folder)
    assert (flat["architectures"], flat["sample_from_anchor"]) == (["DFlashDraftModel"], True)
    assert (
        (after.algorithm, after.gamma) == (before.algorithm, before.gamma) == ("dflash", DEEPSPEC_DFLASH["block_size"])
    )


def test_a_dspark_draft_that_predicts_from_its_masks_says_so_where_sglang_looks(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", nested("dflash_config"))
    config = json.loads((draft / "config.json").read_text())
    config["dflash_config"]["sample_from_anchor"] = False
    flat = json.loads((as_sglang_reads_it(write_draft(tmp_path / "draft", config)) / "config.json").read_text())
    assert flat["sample_from_anchor"] is False
