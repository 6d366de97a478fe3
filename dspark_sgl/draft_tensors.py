"""The tensors of a draft checkpoint, checked from the safetensors headers alone: no weights are read, no torch.

A truncated download, a missing head or a matrix of another model is found in milliseconds, before SGLang has
loaded the target.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from .draft_config import DraftConfig, DraftError, DraftSizes, read_json

Shape = tuple[int, ...]
Tensors = dict[str, tuple[Path, Shape]]

_COPY_AGAIN = "copy or download the checkpoint again"
_INDEX = "model.safetensors.index.json"

# The target's, shared with the draft; rotary caches are recomputed.
_NOT_THE_DRAFTS = ("embed_tokens.", "lm_head.", "rotary_emb.")

# Another publisher's names for the same tensors.
_ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}


def expected_tensors(config: DraftConfig) -> dict[str, Shape]:
    """Names and shapes of the draft's own tensors, as the config promises them."""
    hidden, vocab, rank = config.hidden_size, config.vocab_size, config.markov_rank
    shapes: dict[str, Shape] = {
        "fc.weight": (hidden, hidden * len(config.target_layer_ids)),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(config.num_layers):
        shapes |= _block_layer(config, f"layers.{layer}.")
    if rank:
        shapes |= {
            "markov_head.markov_w1.weight": (vocab, rank),
            "markov_head.markov_w2.weight": (vocab, rank),
        }
    if rank and config.markov_head_type == "gated":
        shapes |= _linear("markov_head.gate_proj", rank, hidden + rank)
    if rank and config.markov_head_type == "rnn":
        shapes |= _linear("markov_head.joint_proj", 3 * rank, 2 * rank + hidden)
    if config.confidence:
        width = hidden + (rank if config.confidence_with_markov else 0)
        shapes |= _linear("confidence_head.proj", 1, width)
    return shapes


def check_tensors(folder: Path, config: DraftConfig) -> None:
    """Compares the checkpoint's headers with the config; raises DraftError for the first thing that is wrong."""
    found = read_tensors(folder)
    if not found or not config.plain:
        return  # other formats and layouts are SGLang's to check when it loads them
    kind = f"{config.algorithm} draft of {config.num_layers} layers"
    kind = f"{config.markov_head_type} {kind}" if config.markov_rank else kind
    compare_tensors(folder, found, expected_tensors(config), {}, _NOT_THE_DRAFTS, kind)


def read_tensors(folder: Path) -> Tensors:
    """Where each tensor is and its shape, by the name it has within the draft; empty for another format's weights."""
    return {
        _canonical(name): (file, shape) for file in weight_files(folder) for name, shape in read_header(file).items()
    }


def compare_tensors(
    folder: Path,
    found: Tensors,
    expected: Mapping[str, Shape],
    optional: Mapping[str, Shape],
    foreign: tuple[str, ...],
    kind: str,
) -> None:
    """Raises DraftError for the first tensor that is missing, has another shape than promised or has no place here.

    optional: tensors that may be left out; foreign: beginnings of names that are none of the draft's business
    """
    for name, shape in {**expected, **optional}.items():
        if name not in found:
            if name in optional:
                continue
            raise DraftError.at(folder, f"tensor {name} is missing", f"config.json promises it; {_COPY_AGAIN}")
        file, actual = found[name]
        if actual != shape:
            problem = f"tensor {name} has shape {list(actual)}, config.json promises {list(shape)}"
            raise DraftError.at(file, problem, "config and weights are not of the same draft")
    for name, (file, _) in found.items():
        if name not in expected and name not in optional and not name.startswith(foreign):
            problem = f"tensor {name} has no place in a {kind}"
            raise DraftError.at(file, problem, "config and weights are not of the same draft")


def check_hot_vocab(folder: Path, vocab_size: int) -> None:
    """`hot_vocab.json`, where a draft has one: the token ids that it may propose."""
    file = folder / "hot_vocab.json"
    if not file.is_file():
        return
    try:
        ids = json.loads(file.read_bytes())
    except ValueError as error:
        raise DraftError.at(file, f"not valid JSON ({error})", _COPY_AGAIN) from None
    if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        problem = f"must be a list of token ids below vocab_size {vocab_size}"
        raise DraftError.at(file, problem, "delete it to draft over the whole vocabulary")
    if len(set(ids)) != len(ids):
        # Two columns for one token would halve its q, and bias rejection sampling.
        raise DraftError.at(file, "names a token twice", "delete it to draft over the whole vocabulary")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; empty when it keeps its weights in another format."""
    if (folder / _INDEX).is_file():
        listed = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise DraftError.at(folder / _INDEX, "weight_map is missing or malformed", _COPY_AGAIN)
        files = [folder / name for name in sorted(set(listed.values()))]
        for file in files:
            if not file.is_file():
                raise DraftError.at(file, "missing, though the index lists it", _COPY_AGAIN)
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt")):
        raise DraftError.at(folder / "model.safetensors", "missing: the folder holds no weights", _COPY_AGAIN)
    return files


def read_header(file: Path) -> dict[str, Shape]:
    """Tensor shapes of a safetensors file: 8 bytes of header length, a JSON header, then exactly the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise DraftError.at(file, f"truncated: {size} bytes do not even hold its header", _COPY_AGAIN)
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise DraftError.at(file, "its header is not that of a safetensors file", _COPY_AGAIN) from None
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "too long"
        raise DraftError.at(file, f"{state}: {size} bytes, its header promises {8 + length + end}", _COPY_AGAIN)
    return shapes


def layer_tensors(sizes: DraftSizes, at: str, attention_in: int) -> Iterator[tuple[str, Shape]]:
    """A decoder layer's weights under the prefix `at`, without biases; q, k and v read `attention_in` values."""
    hidden, middle = sizes.hidden_size, sizes.intermediate_size
    for name, rows, columns in (
        ("self_attn.q_proj", sizes.queries, attention_in),
        ("self_attn.k_proj", sizes.keys, attention_in),
        ("self_attn.v_proj", sizes.keys, attention_in),
        ("self_attn.o_proj", hidden, sizes.queries),
        ("mlp.gate_proj", middle, hidden),
        ("mlp.up_proj", middle, hidden),
        ("mlp.down_proj", hidden, middle),
    ):
        yield f"{at}{name}.weight", (rows, columns)
    yield from ((f"{at}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))


def _block_layer(config: DraftConfig, at: str) -> Iterator[tuple[str, Shape]]:
    """What a block draft's layer has."""
    yield from layer_tensors(config, at, config.hidden_size)
    yield from ((f"{at}self_attn.{name}_norm.weight", (config.head_dim,)) for name in ("q", "k"))
    if config.attention_bias:
        for name, rows in (("q", config.queries), ("k", config.keys), ("v", config.keys), ("o", config.hidden_size)):
            yield f"{at}self_attn.{name}_proj.bias", (rows,)


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _canonical(name: str) -> str:
    name = name.removeprefix("model.")
    return _ALIASES.get(name, name)
