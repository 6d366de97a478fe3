"""The configuration of a draft checkpoint, whatever the publisher's spelling, as one frozen dataclass.

The same field may stand flat in `config.json`, nested under `dspark_config` or `dflash_config`, inside
`text_config`, or prefixed `dspark_`; where it stands more than once the order is the one SGLang uses: prefixed,
`dspark_config`, `dflash_config`, `text_config`, flat. Nothing here imports torch or SGLang.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

HEAD_TYPES = ("vanilla", "gated", "rnn")

# DSpark architectures whose backbone is SGLang's DFlash model; so a DFlash draft in DSpark's clothes is served as one.
DFLASH, DSPARK_BACKBONES = "DFlashDraftModel", ("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel")

# What a bundled draft calls a field whose prefixed name is not simply `dspark_` + the flat one.
_PREFIXED = {"mask_token_id": "dspark_noise_token_id"}

# Parts of an architecture's name, and the algorithm whose draft it is; the first that fits.
_ALGORITHMS = {"dspark": "dspark", "dflash": "dflash", "eagle3": "eagle3", "mtp": "mtp", "nextn": "mtp"}


class DraftError(ValueError):
    """A draft that cannot be served: one line that names the file, the field and what to do."""

    @classmethod
    def at(cls, where: Path | str, problem: str, remedy: str) -> "DraftError":
        return cls(" ".join(f"{where}: {problem}; {remedy}".split()))


@dataclass(frozen=True)
class DraftSizes:
    """What the tensors of any draft's layers follow from."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def queries(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class DraftConfig(DraftSizes):
    """What serving needs to know of a draft of a block drafter.

    block_size: as the file says; rows of the block, which `gamma` turns into drafts
    sample_from_anchor: the anchor's row predicts the first draft, not the first mask's
    """

    file: Path
    algorithm: str  # dspark | dflash | eagle3 | mtp | unknown
    architecture: str
    block_size: int
    sample_from_anchor: bool
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None  # None where the publisher does not say
    attention_bias: bool
    markov_rank: int  # 0: no sequential head (DFlash)
    markov_head_type: str
    confidence: bool
    confidence_with_markov: bool
    plain: bool  # weights are unquantised and of the released layout, so names and shapes follow from this config
    layers_field: ClassVar[str] = "target_layer_ids"

    @property
    def gamma(self) -> int:
        """The draft tokens of one block. In a DFlash block the anchor's row is one of `block_size`, predicting or not;
        a DSpark block has `block_size` drafts in any case."""
        return self.block_size - (self.algorithm == "dflash" and not self.sample_from_anchor)

    def flat(self) -> dict[str, Any]:
        """The fields in the flat spelling, the only one that every part of SGLang's model code reads."""
        fields: dict[str, Any] = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
        }
        # What SGLang takes for granted of an architecture is not said.
        if self.sample_from_anchor == (self.algorithm == "dflash"):
            fields["sample_from_anchor"] = self.sample_from_anchor
        if self.algorithm == "dflash":
            return {"architectures": [DFLASH]} | fields
        return fields | {
            "markov_rank": self.markov_rank,
            "markov_head_type": self.markov_head_type,
            "enable_confidence_head": self.confidence,
            "confidence_head_with_markov": self.confidence_with_markov,
        }


def algorithm_of(raw: Mapping[str, Any]) -> str:
    """Which algorithm a `config.json` is a draft for, from its architecture; `unknown` when it is none of ours.

    DeepSpec releases its DFlash drafts as DSpark models whose sequential head has rank 0.
    """
    name = _architecture(raw).lower()
    if any(f"dspark_{field}" in raw for field in ("block_size", "markov_rank", "target_layer_ids")):
        return "dspark"
    # A model that brings its own prediction modules is called what it is called as a target.
    bundled = "mtp" if raw.get("num_nextn_predict_layers") else "unknown"
    found = next((algorithm for part, algorithm in _ALGORITHMS.items() if part in name), bundled)
    return "dflash" if found == "dspark" and ConfigFields(Path(), raw).get("markov_rank") == 0 else found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a DraftError that says why not."""
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DraftError.at(file, "missing", "is this the folder of a Hugging Face checkpoint?") from None
    except OSError as error:
        raise DraftError.at(file, f"cannot be read ({error.strerror})", "check its permissions") from None
    except ValueError as error:  # malformed JSON or UTF-8
        raise DraftError.at(file, f"not valid JSON ({error})", "copy or download the checkpoint again") from None
    if not isinstance(data, dict):
        raise DraftError.at(file, "not a JSON object", "copy or download the checkpoint again")
    return data


def config_field(file: Path, name: str) -> Any:
    """One field of a `config.json`, wherever it stands; None where it does not."""
    return ConfigFields(file, read_json(file)).get(name)


def read_draft_config(draft: str | Path) -> DraftConfig:
    """Reads `config.json` of a DSpark or DFlash draft, whose fields it checks one by one."""
    folder = Path(draft)
    if not folder.is_dir():
        raise DraftError.at(folder, "no such draft folder", "give the folder that holds the draft's config.json")
    file = folder / "config.json"
    fields = ConfigFields(file, read_json(file))
    heads = fields.integer("num_attention_heads", 1)
    hidden = fields.integer("hidden_size", 1)
    architecture, algorithm = _architecture(fields.raw), algorithm_of(fields.raw)
    from_anchor = fields.flag("sample_from_anchor", default=architecture != DFLASH)
    masks_alone = algorithm == "dflash" and not from_anchor
    rank = 0 if algorithm == "dflash" else fields.integer("markov_rank", 0, default=0)
    return DraftConfig(
        file=file,
        algorithm=algorithm,
        architecture=architecture,
        block_size=fields.integer("block_size", 2 if masks_alone else 1),
        sample_from_anchor=from_anchor,
        mask_token_id=fields.integer("mask_token_id", 0),
        target_layer_ids=fields.layer_ids(),
        num_target_layers=fields.integer("num_target_layers", 1) if fields.has("num_target_layers") else None,
        num_layers=fields.integer("num_hidden_layers", 1),
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size", 1),
        intermediate_size=fields.integer("intermediate_size", 1),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 1, default=heads),
        head_dim=fields.integer("head_dim", 1, default=hidden // heads),
        attention_bias=bool(fields.get("attention_bias")),
        markov_rank=rank,
        markov_head_type=fields.choice("markov_head_type", HEAD_TYPES, default="vanilla"),
        confidence=rank > 0 and fields.get("enable_confidence_head") is not False,
        confidence_with_markov=rank > 0 and fields.get("confidence_head_with_markov") is not False,
        plain=_is_plain(fields),
    )


class ConfigFields:
    """Finds a field under any spelling, and checks its type."""

    kind: ClassVar[str] = "DSpark or DFlash"

    def __init__(self, file: Path, raw: Mapping[str, Any]) -> None:
        self.file, self.raw = file, raw
        self._places = [_mapping(raw.get(key)) for key in ("dspark_config", "dflash_config", "text_config")]
        self._places.append(raw)

    def get(self, name: str) -> Any:
        values = [self.raw.get(_PREFIXED.get(name, f"dspark_{name}"))]
        values += [place.get(name) for place in self._places]
        return next((value for value in values if value is not None), None)

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def integer(self, name: str, low: int, default: int | None = None) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(f"{name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.error(f"{name} must be a whole number of at least {low}, not {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r}")
        return value

    def choice(self, name: str, options: tuple[str, ...], default: str) -> str:
        value = str(self.get(name) or default).lower()
        if value not in options:
            raise self.error(f"{name} must be one of {', '.join(options)}, not {value!r}")
        return value

    def layer_ids(self) -> tuple[int, ...]:
        value = self.get("target_layer_ids")
        if not isinstance(value, list) or not value or any(type(i) is not int or i < -1 for i in value):
            problem = f"target_layer_ids must be a list of layer numbers (-1 is the embedding), not {value!r}"
            raise self.error(problem)
        return tuple(value)

    def error(self, problem: str) -> DraftError:
        return DraftError.at(self.file, problem, f"this is not a draft for {self.kind}, or its config is damaged")


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _is_plain(fields: ConfigFields) -> bool:
    extras = (
        "quantization_config",
        "conv_kernel_size",
        "selector_rank",
        "projector_type",
        "attention_sink_bias",
    )
    return _architecture(fields.raw) in (*DSPARK_BACKBONES, DFLASH) and not any(fields.get(name) for name in extras)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
