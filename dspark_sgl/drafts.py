"""Drafts for a target: finding the one that belongs to it, and saying in one line why a given one does not.

Only configs and headers are read; nothing is downloaded and no weights are loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import cache_dir
from .draft_config import (
    DFLASH,
    DSPARK_BACKBONES,
    DraftConfig,
    DraftError,
    algorithm_of,
    config_field,
    read_draft_config,
    read_json,
)
from .draft_tensors import check_hot_vocab, check_tensors
from .recurrent_config import RECURRENT, RecurrentConfig, check_recurrent, read_recurrent_config

__all__ = ["CHECKPOINTS", "DraftConfig", "DraftError", "check_draft", "find_draft", "known_drafts", "read_draft_config"]

# The model classes that a drafter of ours knows its way around in.
_SERVED = {
    "dspark": (*DSPARK_BACKBONES, "DSparkMiniMaxDraftModel"),
    "dflash": (DFLASH, *DSPARK_BACKBONES),
}

CHECKPOINTS = frozenset((*_SERVED, *RECURRENT))
"""The algorithms that draft with a checkpoint which can be found and checked here."""

Target = Mapping[str, Any] | str | Path  # a config.json's content, the file, or the checkpoint folder


def find_draft(target_config: Target, algorithm: str) -> Path | None:
    """The draft shipped or cached for this target and algorithm (`dspark` or `DSPARK_SGL`), or None.

    A draft of the user's own, under the cache's `drafts/`, goes before a shipped one.
    """
    target = _Target.of(target_config)
    wanted = algorithm.lower().removesuffix("_sgl")
    for folder in known_drafts():
        try:
            config = read_any_draft(folder)
        except DraftError:
            continue  # a half-copied folder in the cache is no reason not to start
        if config.algorithm == wanted and target.mismatch(config) is None:
            return folder
    return None


def check_draft(draft: str | Path, target_config: Target, algorithm: str = "dspark") -> None:
    """Raises DraftError unless this draft can serve this target with this algorithm."""
    folder = Path(draft)
    wanted = algorithm.lower().removesuffix("_sgl")
    if (folder / "config.json").is_file():
        actual = algorithm_of(read_json(folder / "config.json"))
        if actual not in (wanted, "unknown"):
            remedy = f"start with --speculative-algorithm {actual.upper()}_SGL, or give a {wanted} draft"
            raise DraftError.at(folder / "config.json", f"by architectures and heads a draft for {actual}", remedy)
    if wanted in RECURRENT:
        recurrent = read_recurrent_config(folder)
        _refuse(recurrent, target_config)
        check_recurrent(folder, recurrent)
    else:
        _check_block_draft(folder, target_config)


def _check_block_draft(folder: Path, target_config: Target) -> None:
    config = read_draft_config(folder)
    _check_kind(folder, config)
    if config.algorithm == "dspark" and config.markov_rank < 1:
        remedy = "a DSpark draft has a sequential head; without one it is a DFlash draft"
        raise DraftError.at(config.file, "markov_rank must be at least 1, not 0", remedy)
    _refuse(config, target_config)
    if config.mask_token_id >= config.vocab_size:
        problem = f"mask_token_id {config.mask_token_id} lies outside the vocabulary of {config.vocab_size}"
        raise DraftError.at(config.file, problem, "its config is damaged")
    check_tensors(folder, config)
    check_hot_vocab(folder, config.vocab_size)


def read_any_draft(folder: Path) -> DraftConfig | RecurrentConfig:
    """The config of a draft, whatever its algorithm."""
    recurrent = algorithm_of(read_json(folder / "config.json")) in RECURRENT
    return read_recurrent_config(folder) if recurrent else read_draft_config(folder)


def _refuse(config: DraftConfig | RecurrentConfig, target: Target) -> None:
    """Raises DraftError where the draft belongs to another target."""
    if problem := _Target.of(target).mismatch(config):
        raise DraftError.at(config.file, problem, "this draft was trained for another target")


def _check_kind(folder: Path, config: DraftConfig) -> None:
    """What carries the name and drafts in another way would be served exactly, and drafted wrongly."""
    served = _SERVED.get(config.algorithm)
    if served is None:
        return  # nobody's name: SGLang says whether it has a class for it
    remedy = f"use SGLang's own {config.algorithm.upper()} for this one"
    if config.architecture not in served:
        problem = f"architectures: {config.architecture} is not one that {config.algorithm.upper()}_SGL drives"
        raise DraftError.at(config.file, problem, remedy)
    for name in ("projector_type", "selector_rank") if config.algorithm == "dflash" else ():
        if value := config_field(config.file, name):
            raise DraftError.at(config.file, f"{name} {value!r} asks for more than a backbone", remedy)
    if config.algorithm == "dflash" and (folder / "mask_embedding.pt").is_file():
        raise DraftError.at(folder / "mask_embedding.pt", "the mask token has an embedding of its own", remedy)


@dataclass(frozen=True)
class _Target:
    """The facts of a target that its draft must share."""

    hidden_size: int
    vocab_size: int
    num_layers: int

    @classmethod
    def of(cls, source: Target) -> "_Target":
        raw = source if isinstance(source, Mapping) else _read_target(Path(source))
        text = raw["text_config"] if isinstance(raw.get("text_config"), Mapping) else raw
        names = ("hidden_size", "vocab_size", "num_hidden_layers")
        for name in names:
            if not isinstance(text.get(name), int):
                where = "the target's config" if isinstance(source, Mapping) else source
                raise DraftError.at(where, f"{name} is missing", "is this the config.json of a language model?")
        return cls(*(text[name] for name in names))

    def mismatch(self, draft: DraftConfig | RecurrentConfig) -> str | None:
        """The first fact in which draft and target differ, in words."""
        for name, mine, other in (
            ("hidden_size", draft.hidden_size, self.hidden_size),
            ("vocab_size", draft.vocab_size, self.vocab_size),
            ("num_target_layers", draft.num_target_layers or self.num_layers, self.num_layers),
        ):
            if mine != other:
                return f"{name} is {mine}, the target has {other}"
        highest = max(draft.target_layer_ids, default=0)
        last = self.num_layers - 2  # SGLang's models hand out what enters a layer, so not what leaves the last one
        if highest > last:
            readable = f"of this target's {self.num_layers}, 0 to {last} can be read"
            return f"{draft.layers_field} names layer {highest}; {readable}"
        return None


def _read_target(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json" if path.is_dir() else path)


def known_drafts() -> Iterator[Path]:
    """Folders of all drafts on this machine that the package knows of, the user's own first."""
    for root in (cache_dir("drafts"), Path(__file__).parent / "drafts"):
        yield from sorted(file.parent for file in root.glob("*/config.json"))
