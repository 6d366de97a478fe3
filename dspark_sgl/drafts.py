"""Drafts for a target: finding the one that belongs to it, and saying in one line why a given one does not.

Only configs and headers are read; nothing is downloaded and no weights are loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import cache_dir
from .draft_config import DraftConfig, DraftError, algorithm_of, read_draft_config, read_json
from .draft_tensors import check_hot_vocab, check_tensors

__all__ = ["DraftConfig", "DraftError", "check_draft", "find_draft", "known_drafts", "read_draft_config"]

Target = Mapping[str, Any] | str | Path  # a config.json's content, the file, or the checkpoint folder


def find_draft(target_config: Target, algorithm: str) -> Path | None:
    """The draft shipped or cached for this target and algorithm (`dspark` or `DSPARK_SGL`), or None.

    A draft of the user's own, under the cache's `drafts/`, goes before a shipped one.
    """
    target = _Target.of(target_config)
    wanted = algorithm.lower().removesuffix("_sgl")
    for folder in known_drafts():
        try:
            config = read_draft_config(folder)
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
            raise DraftError.at(folder / "config.json", f"architectures: this is a draft for {actual}", remedy)
    config = read_draft_config(folder)
    if config.algorithm == "dspark" and config.markov_rank < 1:
        remedy = "a DSpark draft has a sequential head; without one it is a DFlash draft"
        raise DraftError.at(config.file, "markov_rank must be at least 1, not 0", remedy)
    problem = _Target.of(target_config).mismatch(config)
    if problem:
        raise DraftError.at(config.file, problem, "this draft was trained for another target")
    if config.mask_token_id >= config.vocab_size:
        problem = f"mask_token_id {config.mask_token_id} lies outside the vocabulary of {config.vocab_size}"
        raise DraftError.at(config.file, problem, "its config is damaged")
    check_tensors(folder, config)
    check_hot_vocab(folder, config)


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

    def mismatch(self, draft: DraftConfig) -> str | None:
        """The first fact in which draft and target differ, in words."""
        for name, mine, other in (
            ("hidden_size", draft.hidden_size, self.hidden_size),
            ("vocab_size", draft.vocab_size, self.vocab_size),
            ("num_target_layers", draft.num_target_layers or self.num_layers, self.num_layers),
        ):
            if mine != other:
                return f"{name} is {mine}, the target has {other}"
        highest = max(draft.target_layer_ids)
        last = self.num_layers - 2  # SGLang's models hand out what enters a layer, so not what leaves the last one
        if highest > last:
            return (
                f"target_layer_ids names layer {highest}; of this target's {self.num_layers}, 0 to {last} can be read"
            )
        return None


def _read_target(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json" if path.is_dir() else path)


def known_drafts() -> Iterator[Path]:
    """Folders of all drafts on this machine that the package knows of, the user's own first."""
    for root in (cache_dir("drafts"), Path(__file__).parent / "drafts"):
        yield from sorted(file.parent for file in root.glob("*/config.json"))
