"""A DeepSeek-V4 server that asks for our algorithm: SGLang's own resolution of its arguments, as for a GPU, on any
machine. What follows it, the kernels, needs a GPU (`bench/gpu/deepseek_v4.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.deepseek_v4 import CONFIG, write_config

pytest.importorskip("sglang")

RESOLVE = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dspark_components.dspark_config import parse_dspark_draft_config

def resolve(folder, algorithm="DSPARK_SGL", device="cuda", policy=""):
    os.environ["DSPARK_POLICY"] = policy
    args = ServerArgs(model_path=folder, load_format="dummy", skip_tokenizer_init=True, device=device,
                      speculative_algorithm=algorithm)
    try:
        args.resolve_once()
    except SystemExit as error:
        return str(error)
    settings = args.resolved_dict()
    model = ModelConfig.from_server_args(args, model_path=settings["speculative_draft_model_path"], is_draft_model=True)
    draft = parse_dspark_draft_config(draft_hf_config=model.hf_config)
    return {
        "algorithm": settings["speculative_algorithm"], "rows": settings["speculative_num_draft_tokens"],
        "draft": settings["speculative_draft_model_path"], "class": model.hf_config.architectures,
        "layers": draft.target_layer_ids, "rank": draft.markov_rank,
    }

print(json.dumps([resolve(**case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def without_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v4-without")
    config = {key: value for key, value in CONFIG.items() if not key.startswith("dspark_")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def resolved(folder: Path, without_draft: Path) -> dict[str, Any]:
    """What SGLang makes of the arguments in each case, or the line it ends with. One process: imports take long."""
    cases = {
        "handed over": {"algorithm": "dspark_sgl"},
        "another algorithm": {"algorithm": "DFLASH_SGL"},
        "cpu": {"device": "cpu"},
        "policy": {"policy": "fixed-3"},
        "no draft": {"folder": str(without_draft)},
    }
    asked = json.dumps([{"folder": str(folder), **case} for case in cases.values()])
    command = [sys.executable, "-c", RESOLVE, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout.strip().splitlines()[-1]), strict=True))


def test_the_bundled_draft_is_loaded_by_sglangs_own_class(resolved: dict[str, Any], folder: Path) -> None:
    assert resolved["handed over"] == {
        "algorithm": "DSPARK",
        "rows": CONFIG["dspark_block_size"] + 1,
        "draft": str(folder),
        "class": ["DeepseekV4ForCausalLMDSpark"],
        "layers": CONFIG["dspark_target_layer_ids"],
        "rank": CONFIG["dspark_markov_rank"],
    }


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("another algorithm", "use DSPARK_SGL"),
        ("cpu", "on no CPU"),
        ("policy", "remove --dspark-policy fixed-3"),
        ("no draft", "dspark_block_size"),
    ],
)
def test_what_cannot_be_handed_over_is_one_line(resolved: dict[str, Any], case: str, named: str) -> None:
    said = resolved[case]
    assert isinstance(said, str) and said.startswith("error: /") and named in said and "\n" not in said
