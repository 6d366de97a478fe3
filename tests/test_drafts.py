"""A draft is found for its target, read in every spelling, and refused in one line that says what to do."""

import json
import struct
from pathlib import Path

import pytest
from draft_checkpoints import (
    CONFIG,
    DEEPSPEC_DFLASH,
    DFLASH,
    TARGET,
    dflash_tensors,
    tensors,
    write_draft,
    write_safetensors,
)

from dspark_sgl.drafts import DraftError, check_draft, find_draft, read_draft_config

FIELDS = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")


def without(*names: str) -> dict:
    return {name: value for name, value in CONFIG.items() if name not in names}


def nested(key: str) -> dict:
    return without(*FIELDS) | {key: {name: CONFIG[name] for name in FIELDS}}


def prefixed() -> dict:
    spelled = {f"dspark_{name}": CONFIG[name] for name in FIELDS if name != "mask_token_id"}
    return without(*FIELDS) | spelled | {"dspark_noise_token_id": CONFIG["mask_token_id"]}


def refusal(folder: Path, target=TARGET, algorithm: str = "dspark") -> str:
    with pytest.raises(DraftError) as caught:
        check_draft(folder, target, algorithm)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    assert ";" in line  # the remedy follows
    return line


@pytest.mark.parametrize(
    "config",
    [CONFIG, nested("dspark_config"), nested("dflash_config"), nested("text_config"), prefixed()],
    ids=["flat", "dspark_config", "dflash_config", "text_config", "prefixed"],
)
def test_every_spelling_reads_the_same(tmp_path: Path, config: dict):
    folder = write_draft(tmp_path / "d", config)
    read = read_draft_config(folder)
    assert (read.algorithm, read.block_size, read.mask_token_id, read.target_layer_ids) == ("dspark", 5, 31, (1, 4))
    assert (read.markov_rank, read.markov_head_type, read.confidence) == (3, "vanilla", True)
    assert read.flat()["target_layer_ids"] == [1, 4]
    check_draft(folder, TARGET)


def test_sglang_reads_the_same_from_every_spelling(tmp_path: Path):
    sglang_config = pytest.importorskip("sglang.srt.speculative.dspark_components.dspark_config")
    # SGLang looks for block_size and target_layer_ids under `dflash_config` only, hence not under `dspark_config` here.
    for config in (CONFIG, nested("dflash_config"), prefixed()):
        ours = read_draft_config(write_draft(tmp_path / "d", config))
        theirs = sglang_config.parse_dspark_draft_config(draft_hf_config=config)
        assert (ours.block_size, ours.mask_token_id) == (theirs.gamma, theirs.mask_token_id)
        assert list(ours.target_layer_ids) == theirs.target_layer_ids
        assert (ours.markov_rank, ours.markov_head_type) == (theirs.markov_rank, theirs.markov_head_type)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_every_sequential_head_passes(tmp_path: Path, head: str):
    check_draft(write_draft(tmp_path / "d", CONFIG | {"markov_head_type": head}, tensors(head)), TARGET)


def test_shared_and_prefixed_tensors_are_welcome(tmp_path: Path):
    shapes = {f"model.{name}": shape for name, shape in tensors().items()}
    shapes |= {"model.embed_tokens.weight": (32, 8), "lm_head.weight": (32, 8)}
    check_draft(write_draft(tmp_path / "d", shapes=shapes), TARGET)


def test_a_sharded_checkpoint_passes(tmp_path: Path):
    folder, names = write_draft(tmp_path / "d"), list(tensors().items())
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": dict(names[:9]), "b.safetensors": dict(names[9:])}
    for file, shapes in parts.items():
        write_safetensors(folder / file, shapes)
    index = {"weight_map": {name: file for file, shapes in parts.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_draft(folder, TARGET)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors: missing" in refusal(folder)


def test_a_draft_without_a_confidence_head_passes(tmp_path: Path):
    shapes = {name: shape for name, shape in tensors().items() if not name.startswith("confidence")}
    check_draft(write_draft(tmp_path / "d", CONFIG | {"enable_confidence_head": False}, shapes), TARGET)


def test_quantised_weights_are_left_to_sglang(tmp_path: Path):
    check_draft(write_draft(tmp_path / "d", CONFIG | {"quantization_config": {"bits": 4}}, {"x": (1,)}), TARGET)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 0}, "block_size must be a whole number of at least 1, not 0"),
        ({"block_size": None}, "block_size is missing"),
        ({"mask_token_id": None}, "mask_token_id is missing"),
        ({"mask_token_id": 32}, "mask_token_id 32 lies outside"),
        ({"target_layer_ids": []}, "target_layer_ids must be a list"),
        ({"target_layer_ids": [1, 6]}, "target_layer_ids names layer 6; of this target's 6, 0 to 4 can be read"),
        ({"target_layer_ids": [1, 5]}, "target_layer_ids names layer 5; of this target's 6, 0 to 4 can be read"),
        ({"target_layer_ids": [-2, 1]}, "target_layer_ids must be a list of layer numbers (-1 is the embedding)"),
        ({"hidden_size": 16}, "hidden_size is 16, the target has 8"),
        ({"vocab_size": 64}, "vocab_size is 64, the target has 32"),
        ({"num_target_layers": 9}, "num_target_layers is 9, the target has 6"),
        ({"markov_head_type": "gru"}, "markov_head_type must be one of vanilla, gated, rnn"),
        ({"markov_head_type": "gated"}, "tensor markov_head.gate_proj.weight is missing"),
        ({"markov_rank": 0}, "a draft for dflash; start with --speculative-algorithm DFLASH_SGL"),
        ({"markov_rank": None}, "markov_rank must be at least 1"),
        ({"markov_rank": 4}, "tensor markov_head.markov_w1.weight has shape [32, 3]"),
        ({"target_layer_ids": [1]}, "tensor fc.weight has shape [8, 16], config.json promises [8, 8]"),
        ({"num_hidden_layers": 1}, "tensor layers.1."),
        ({"num_hidden_layers": 3}, "tensor layers.2.self_attn.q_proj.weight is missing"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "EAGLE3_SGL"),
        ({"architectures": ["Gemma4DSparkModel"]}, "Gemma4DSparkModel is not one that DSPARK_SGL drives"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict, words: str):
    assert words in refusal(write_draft(tmp_path / "d", CONFIG | change))


def test_a_missing_folder_config_or_weights_is_named(tmp_path: Path):
    assert "no such draft folder" in refusal(tmp_path / "nothing")
    folder = write_draft(tmp_path / "d")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(tmp_path: Path, keep: int):
    file = write_draft(tmp_path / "d") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: truncated" in refusal(tmp_path / "d")


@pytest.mark.parametrize("header", [b"[]", b"{}}", b'{"a": 1}', b'{"a": {"shape": ["x"], "data_offsets": [0, 0]}}'])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, header: bytes):
    write_draft(tmp_path / "d")
    (tmp_path / "d" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not that of a safetensors file" in refusal(tmp_path / "d")


@pytest.mark.parametrize("content", ["{", "[]", "[32]", '["a"]'])
def test_a_bad_hot_vocabulary_is_refused(tmp_path: Path, content: str):
    (write_draft(tmp_path / "d") / "hot_vocab.json").write_text(content)
    assert "hot_vocab.json" in refusal(tmp_path / "d")


def test_the_target_may_be_a_folder_a_file_or_a_mapping(tmp_path: Path):
    folder = write_draft(tmp_path / "d")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": TARGET}))
    for target in (tmp_path, file, str(tmp_path), {"text_config": TARGET}):
        check_draft(folder, target)
    file.write_text("{}")
    with pytest.raises(DraftError, match="hidden_size is missing"):
        check_draft(folder, tmp_path)


def test_a_cached_draft_is_found_for_its_target_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drafts = tmp_path / "dspark_sgl" / "drafts"
    write_draft(drafts / "broken", {})
    mine = write_draft(drafts / "mine")
    assert find_draft(TARGET, "dspark") == mine
    assert find_draft(TARGET, "DSPARK_SGL") == mine
    assert find_draft(TARGET, "DFLASH_SGL") is None
    for change in ({"hidden_size": 16}, {"vocab_size": 64}, {"num_hidden_layers": 5}):
        assert find_draft(TARGET | change, "dspark") is None


def test_every_shipped_draft_is_whole():
    import dspark_sgl.drafts as module

    for file in (Path(module.__file__).parent / "drafts").glob("*/config.json"):
        config = read_draft_config(file.parent)
        target = {name: getattr(config, name) for name in ("hidden_size", "vocab_size")}
        check_draft(file.parent, target | {"num_hidden_layers": config.num_target_layers}, config.algorithm)


def write_dflash(folder: Path, **changes) -> Path:
    """A DFlash draft in SGLang's layout with some fields of its config changed."""
    return write_draft(folder, DFLASH | changes, dflash_tensors())


@pytest.mark.parametrize(
    ("config", "gamma"),
    [
        (DFLASH, 4),
        (DFLASH | {"sample_from_anchor": False}, 4),
        (DFLASH | {"sample_from_anchor": True}, 5),
        ({**DFLASH, "block_size": None, "dflash_config": {"block_size": 5}}, 4),
        (DEEPSPEC_DFLASH, 5),
        (DEEPSPEC_DFLASH | {"sample_from_anchor": False}, 4),
    ],
    ids=["sglang", "sglang, said", "from the anchor", "nested", "deepspec", "deepspec from the masks"],
)
def test_how_many_drafts_a_dflash_block_has(tmp_path: Path, config: dict, gamma: int):
    """Its `block_size` counts the anchor's row, which predicts a draft or does not."""
    folder = write_draft(tmp_path / "d", config, dflash_tensors())
    read = read_draft_config(folder)
    assert (read.algorithm, read.gamma, read.block_size) == ("dflash", gamma, 5)
    check_draft(folder, TARGET, "DFLASH_SGL")


@pytest.mark.parametrize("from_anchor", [True, False])
def test_a_dspark_block_has_block_size_drafts(tmp_path: Path, from_anchor: bool):
    assert read_draft_config(write_draft(tmp_path / "d", CONFIG | {"sample_from_anchor": from_anchor})).gamma == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 1}, "block_size must be a whole number of at least 2"),
        ({"sample_from_anchor": 1}, "sample_from_anchor must be true or false"),
        ({"num_hidden_layers": 3}, "tensor layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "no place in a dflash draft of 1 layers"),
        ({"target_layer_ids": [1]}, "tensor fc.weight has shape [8, 16], config.json promises [8, 8]"),
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel is not one that DFLASH_SGL drives"),
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type 'domino' asks for more than a backbone"),
        ({"architectures": ["Qwen3DSparkModel"], "markov_rank": 3}, "a draft for dspark; start with"),
    ],
)
def test_a_dflash_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict, words: str):
    assert words in refusal(write_dflash(tmp_path / "d", **change), algorithm="dflash")


def test_a_dflash_draft_has_no_heads(tmp_path: Path):
    folder = write_draft(tmp_path / "d", DFLASH, tensors())
    assert "tensor markov_head.markov_w1.weight has no place in a dflash draft of 2 layers" in refusal(
        folder, algorithm="dflash"
    )
    renamed = {name.replace("hidden_norm", "hiden_norm"): shape for name, shape in dflash_tensors().items()}
    assert "tensor hidden_norm.weight is missing" in refusal(
        write_draft(tmp_path / "d", DFLASH, renamed), algorithm="dflash"
    )


def test_dspark_and_dflash_drafts_are_told_apart(tmp_path: Path):
    dflash = write_dflash(tmp_path / "dflash")
    released = write_draft(tmp_path / "released", DEEPSPEC_DFLASH, dflash_tensors())
    dspark = write_draft(tmp_path / "dspark")
    for folder in (dflash, released):
        assert "a draft for dflash; start with --speculative-algorithm DFLASH_SGL" in refusal(folder)
    assert "a draft for dspark; start with --speculative-algorithm DSPARK_SGL" in refusal(dspark, algorithm="dflash")


def test_a_cached_dflash_draft_is_found_by_its_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drafts = tmp_path / "dspark_sgl" / "drafts"
    mine, other = write_dflash(drafts / "dflash"), write_draft(drafts / "dspark")
    assert (find_draft(TARGET, "DFLASH_SGL"), find_draft(TARGET, "DSPARK_SGL")) == (mine, other)
