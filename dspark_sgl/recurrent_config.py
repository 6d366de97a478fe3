"""Eagle3 and MTP drafts: their `config.json` as one frozen dataclass, and the tensors it promises.

Reads configs, safetensors headers and the small table of a draft's vocabulary; no other weights, no torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors import safe_open

from .draft_config import ConfigFields, DraftError, DraftSizes, algorithm_of, read_json
from .draft_tensors import Shape, check_hot_vocab, compare_tensors, layer_tensors, read_tensors

RECURRENT = ("eagle3", "mtp")
"""The algorithms whose drafts are read here."""

_EAGLE3_LAYERS = "eagle_aux_hidden_state_layer_ids"
_MODULE = "mtp_layers.0."

# The target's embedding and head; and the rest of a target that brings its prediction modules along.
_NOT_THE_DRAFTS = {
    "eagle3": ("embed_tokens.", "rotary_emb."),
    "mtp": ("embed_tokens.", "lm_head.", "layers.", "norm.", "mtp_layers."),
}


@dataclass(frozen=True)
class RecurrentConfig(DraftSizes):
    """What serving needs to know of an Eagle3 or MTP draft.

    draft_vocab_size: columns of a head of the draft's own; None when it uses the target's
    target_layer_ids: the layers an Eagle3 draft reads, in rising order; empty for MTP, which reads the final output
    plain: unquantised and of the known layout, so that names and shapes follow from this config
    """

    file: Path
    algorithm: str
    architecture: str
    target_layer_ids: tuple[int, ...]
    draft_vocab_size: int | None
    plain: bool
    num_target_layers: None = None
    layers_field: ClassVar[str] = f"eagle_config.{_EAGLE3_LAYERS}"


class _Fields(ConfigFields):
    kind = "Eagle3 or MTP"


def read_recurrent_config(draft: str | Path) -> RecurrentConfig:
    """Reads `config.json` of an Eagle3 or MTP draft, whose fields it checks one by one."""
    file = Path(draft) / "config.json"
    fields = _Fields(file, read_json(file))
    algorithm = algorithm_of(fields.raw)
    eagle3 = algorithm == "eagle3"
    heads = fields.integer("num_attention_heads", 1)
    hidden, vocab = fields.integer("hidden_size", 1), fields.integer("vocab_size", 1)
    architecture = str((fields.raw.get("architectures") or [""])[0])
    layout = architecture == "LlamaForCausalLMEagle3" if eagle3 else architecture in ("MiMoForCausalLM", "MiMoMTP")
    return RecurrentConfig(
        file=file,
        algorithm=algorithm,
        architecture=architecture,
        target_layer_ids=_target_layers(fields) if eagle3 else (),
        draft_vocab_size=_draft_vocab(fields) if eagle3 else None,
        num_layers=fields.integer("num_hidden_layers", 1) if eagle3 else 1,
        hidden_size=hidden,
        vocab_size=vocab,
        intermediate_size=fields.integer("intermediate_size", 1),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 1, default=heads),
        head_dim=fields.integer("head_dim", 1, default=hidden // heads),
        plain=layout and not any(fields.get(name) for name in (_EXTRAS if eagle3 else _EXTRAS[:1])),
    )


def check_recurrent(folder: Path, config: RecurrentConfig) -> None:
    """Raises DraftError for the first tensor or vocabulary entry that is not as the config promises."""
    found = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in read_tensors(folder).items()}
    if found and config.plain:
        tensors = _eagle3_tensors if config.algorithm == "eagle3" else _mtp_tensors
        foreign = _NOT_THE_DRAFTS[config.algorithm]
        optional: dict[str, Shape] = {"t2d": (config.vocab_size,)} if config.algorithm == "eagle3" else {}
        compare_tensors(folder, found, dict(tensors(config)), optional, foreign, f"draft for {config.algorithm}")
    if "d2t" in found:
        _check_draft_vocab(found["d2t"][0], config.vocab_size)
    check_hot_vocab(folder, config.vocab_size)


_EXTRAS = (
    "quantization_config",
    "fc_norm",
    "use_aux_norm",
    "norm_before_fc",
    "target_hidden_size",
    "num_aux_hidden_states",
    "tie_word_embeddings",
    "bias",
)
"""Fields of a layout with more, or fewer, tensors than written here; SGLang checks those when it loads them."""


def _target_layers(fields: ConfigFields) -> tuple[int, ...]:
    eagle = fields.raw.get("eagle_config")
    value = eagle.get(_EAGLE3_LAYERS) if isinstance(eagle, dict) else None
    if not isinstance(value, list) or not value or any(type(i) is not int or i < -1 for i in value):
        problem = f"eagle_config.{_EAGLE3_LAYERS} must be a list of layer numbers (-1 is the embedding), not {value!r}"
        raise fields.error(problem)
    if sorted(set(value)) != value:
        # SGLang hands them out in the order of the layers, whatever the order of the list.
        raise fields.error(f"eagle_config.{_EAGLE3_LAYERS} must rise, not {value!r}")
    return tuple(value)


def _draft_vocab(fields: ConfigFields) -> int | None:
    if "draft_vocab_size" not in fields.raw:
        raise fields.error("draft_vocab_size is missing (null for a draft that uses the target's head)")
    return None if fields.raw["draft_vocab_size"] is None else fields.integer("draft_vocab_size", 1)


def _eagle3_tensors(config: RecurrentConfig) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield "fc.weight", (hidden, hidden * len(config.target_layer_ids))
    yield "norm.weight", (hidden,)
    for layer in range(config.num_layers):
        # The first layer reads the token's embedding beside the hidden state.
        yield from layer_tensors(config, f"layers.{layer}.", 2 * hidden if layer == 0 else hidden)
        yield f"layers.{layer}.hidden_norm.weight", (hidden,)
    if config.draft_vocab_size is not None:
        yield "lm_head.weight", (config.draft_vocab_size, hidden)
        yield "d2t", (config.draft_vocab_size,)


def _mtp_tensors(config: RecurrentConfig) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield f"{_MODULE}input_proj.weight", (hidden, 2 * hidden)
    for norm in ("token", "hidden", "final"):
        yield f"{_MODULE}{norm}_layernorm.weight", (hidden,)
    yield from layer_tensors(config, _MODULE, hidden)
    for name, rows in (("q", config.queries), ("k", config.keys), ("v", config.keys)):
        yield f"{_MODULE}self_attn.{name}_proj.bias", (rows,)


def _check_draft_vocab(file: Path, vocab_size: int) -> None:
    """`d2t` says by how much column j's token lies above j; every token may have one column."""
    with safe_open(file, framework="numpy") as tensors:
        offsets = tensors.get_tensor("d2t")
    tokens = [column + int(offset) for column, offset in enumerate(offsets)]
    if any(not 0 <= token < vocab_size for token in tokens):
        problem = f"tensor d2t names a token outside the vocabulary of {vocab_size}"
        raise DraftError.at(file, problem, "config and weights are not of the same draft")
    if len(set(tokens)) != len(tokens):
        # Two columns for one token would halve its q, and bias rejection sampling.
        raise DraftError.at(file, "tensor d2t names a token twice", "config and weights are not of the same draft")
