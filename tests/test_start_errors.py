"""What a user gets wrong at the start is one line that names the file, the field and the remedy; never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_sgl.draft_config import DraftError
from dspark_sgl.settings import POLICY_VARIABLE
from dspark_sgl.unserved import SWITCHES, refuse_runner, refuse_target

from .draft_checkpoints import TARGET, write_draft

pytest.importorskip("sglang")


@pytest.fixture
def args(tmp_path: Path) -> SimpleNamespace:
    """Server arguments that would start."""
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET))
    return SimpleNamespace(
        model_path=str(tmp_path / "target"),
        revision=None,
        speculative_draft_model_path=str(write_draft(tmp_path / "draft")),
        speculative_draft_model_revision=None,
        speculative_num_steps=None,
        speculative_num_draft_tokens=None,
        pp_size=1,
        attn_dp_size=1,
        disaggregation_mode="null",
        tokenizer_worker_num=1,
        tp_size=1,
        moe_a2a_backend="none",
        moe_dense_tp_size=None,
        dcp_size=1,
        preferred_sampling_params=None,
        **dict.fromkeys(SWITCHES, False),
        cuda_graph_config=CudaGraphConfig(decode=PhaseConfig("full"), prefill=PhaseConfig("full")),
    )


def configure(args: Any) -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    load_plugins()
    SpeculativeAlgorithm.from_string("DSPARK_SGL").handle_server_args(args)


def refusal(args: Any) -> str:
    with pytest.raises(SystemExit) as error:
        configure(args)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


@pytest.mark.parametrize(("policy", "rows"), [("fixed-5", 6), ("adaptive", 33)])
def test_good_arguments_start(args: SimpleNamespace, policy: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV for a block of 5 and its anchor, or for the largest tree that the policy may ask for."""
    monkeypatch.setenv(POLICY_VARIABLE, policy)
    configure(args)
    assert args.disable_overlap_schedule and args.speculative_num_draft_tokens == rows


@pytest.mark.parametrize("wish", ["full", "disabled"])
def test_the_graphs_of_a_round_are_ours_if_any(args: SimpleNamespace, wish: str) -> None:
    args.cuda_graph_config.decode.backend = wish
    configure(args)
    assert args.cuda_graph_config.decode.backend == "disabled" and args.cuda_graph_config.prefill.backend == "full"
    assert args.disable_decode_cuda_graph == (wish == "disabled")


def test_a_missing_draft(args: SimpleNamespace) -> None:
    args.speculative_draft_model_path += "-not"
    assert "draft-not" in refusal(args)


def test_a_truncated_draft(args: SimpleNamespace) -> None:
    weights = Path(args.speculative_draft_model_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(args)


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 999), ("hidden_size", 24)])
def test_a_draft_for_another_target(args: SimpleNamespace, field: str, value: int) -> None:
    config = Path(args.model_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    assert field in refusal(args)


def test_gamma_zero(args: SimpleNamespace) -> None:
    config = Path(args.speculative_draft_model_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_size": 0}))
    assert "block_size" in refusal(args)


def test_no_draft_for_this_target(args: SimpleNamespace) -> None:
    args.speculative_draft_model_path = None
    assert "--speculative-draft-model-path" in refusal(args)


def test_an_unknown_policy(args: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLICY_VARIABLE, "fixed-55")
    assert "fixed-55" in refusal(args)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("pp_size", 2, "--pp-size 2"),
        ("attn_dp_size", 2, "data-parallel attention"),
        ("disaggregation_mode", "decode", "--disaggregation-mode decode"),
        ("tokenizer_worker_num", 2, "--tokenizer-worker-num"),
        ("moe_a2a_backend", "deepep", "--moe-a2a-backend deepep"),
        ("moe_dense_tp_size", 2, "--moe-dense-tp-size 2"),
        ("dcp_size", 2, "--dcp-size 2"),
        ("preferred_sampling_params", {"custom_params": {"dspark": {"max_depth": -1}}}, "max_depth must be"),
        ("preferred_sampling_params", '{"custom_params": {"dspark": 3}}', "--preferred-sampling-params"),
        *((name, True, f"--{name.replace('_', '-')}") for name in SWITCHES),
    ],
)
def test_a_setting_that_rounds_do_not_fit(args: SimpleNamespace, field: str, value: object, named: str) -> None:
    setattr(args, field, value)
    assert named in refusal(args)


def test_preferred_parameters_may_name_a_depth(args: SimpleNamespace) -> None:
    args.preferred_sampling_params = {"temperature": 0.5, "custom_params": {"dspark": {"max_depth": 2}}}
    configure(args)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"compress_ratios": [4, 128]}, "MLA"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"mamba_d_state": 128}, "mamba_d_state"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"add_swa_attention_sink_bias": True}, "sinks"),
        ({"layer_types": ["chunked_attention"], "attention_chunk_size": 8192}, "chunks"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "M-RoPE"),
    ],
)
def test_a_target_that_a_verify_does_not_fit(args: SimpleNamespace, fields: dict[str, Any], named: str) -> None:
    """A text model, or the text part of another."""
    config = Path(args.model_path) / "config.json"
    for content in ({**TARGET, **fields}, {"text_config": {**TARGET, **fields}}):
        config.write_text(json.dumps(content))
        text = refusal(args)
        assert named in text and str(config) in text and "start without" in text


def test_a_target_with_sliding_windows_starts_on_a_cpu(args: SimpleNamespace) -> None:
    """On a GPU FlashInfer has the attention, and its backend does not fit."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "mamba_chunk_size": None}
    folder = Path(args.model_path)
    (folder / "config.json").write_text(json.dumps({**TARGET, **layers}))
    configure(args)
    with pytest.raises(DraftError, match=r"config\.json.*sliding windows.*start without"):
        refuse_target(folder, "DSPARK_SGL", on_gpu=True)
    for device, window, fits in (("cpu", 512, True), ("cuda", None, True), ("cuda", -1, True), ("cuda", 512, False)):
        # Some models slide without saying so in their config.
        with nullcontext() if fits else pytest.raises(DraftError, match="sliding windows"):
            refuse_runner(SimpleNamespace(device=device, sliding_window_size=window), "DSPARK_SGL")


def test_an_sglang_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks for our algorithm and gets the reason."""
    from sglang.srt.speculative import spec_registry
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from dspark_sgl import compat, plugin

    def require() -> None:
        raise compat.CompatError("SGLang 9.9 does not fit")

    monkeypatch.setattr(compat, "require", require)
    monkeypatch.setattr(spec_registry, "_REGISTRY", {})  # as in a process that has not loaded the plugin yet
    plugin.load()
    with pytest.raises(SystemExit, match="^error: SGLang 9.9 does not fit$"):
        SpeculativeAlgorithm.from_string("DSPARK_SGL").validate_server_args(None)


@pytest.mark.server
def test_the_launched_server_says_it_in_one_line(target: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(target)),
                *("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", "fixed-l"),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=300,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "fixed-l" in lines[0] and "did you mean" in lines[0]
