"""Read the target's responses once and keep its hidden states on disk: every draft trains from the same cache.

The frozen target is the dearest part of a training step and says the same each time, so it speaks once. A cache is a
folder with `records.jsonl` (the responses, shortest first), `meta.json` and `states.bf16`: one row per token, the
outputs of the chosen layers and then the final normed state that the target's head reads. Never trains, and never knows
which draft will read it. Kill it at any time; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.corpus import read_corpus
from recipes.data import Record, read_records
from recipes.llama import FrozenLlama

LAYERS = (10, 17, 22, 26, 28)
"""Of SmolLM2-135M's 30: mostly late ones, whose outputs say most of the next tokens."""


@dataclass(frozen=True)
class Reading:
    """What the target thought while it read a batch of right-padded sequences.

    ids: int64 `[n, t]`; prompt, length: int64 `[n]`, tokens of the prompt and of the whole
    features: `[n, t, K * H]`, outputs of the chosen layers; final: `[n, t, H]`, what the target's head reads
    """

    ids: Tensor
    prompt: Tensor
    length: Tensor
    features: Tensor
    final: Tensor

    def to(self, device: str | torch.device) -> Reading:
        return Reading(*(t.to(device) for t in (self.ids, self.prompt, self.length, self.features, self.final)))


def pad(records: list[Record]) -> tuple[Tensor, Tensor, Tensor]:
    """ids `[n, t]` right-padded with 0, lengths of the prompts and of the whole."""
    rows = [torch.tensor(r.prompt_ids + r.response_ids) for r in records]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.tensor([len(r.prompt_ids) for r in records]), torch.tensor([len(r) for r in rows])


def read(target: FrozenLlama, records: list[Record], layers: tuple[int, ...]) -> Reading:
    """The reading of a few records, computed now."""
    ids, prompt, length = pad(records)
    final, features = target.read(ids.to(target.device), layers)
    return Reading(ids.to(target.device), prompt, length, features, final)


class StateCache:
    """A finished cache: the records, and their readings batch by batch."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.layers: tuple[int, ...] = tuple(meta["layers"])
        self.hidden: int = meta["hidden"]
        self.records = read_records(folder / "records.jsonl")
        if meta["done"] < len(self.records):
            raise SystemExit(f"error: {folder} holds {meta['done']} of {len(self.records)} records; run recipes.states")
        self._start = [0, *accumulate(map(len, self.records))]
        rows = _rows(folder, self._start[-1], (len(self.layers) + 1) * self.hidden)
        self._rows = rows.view(len(rows), -1, self.hidden)

    def reading(self, indices: list[int], layers: tuple[int, ...]) -> Reading:
        """The reading of these records, padded to the longest, with the features of these of the cached layers."""
        ids, prompt, length = pad([self.records[i] for i in indices])
        places = [self.layers.index(layer) for layer in layers]

        def padded(places: list[int]) -> Tensor:
            rows = [self._rows[self._start[i] : self._start[i + 1], places].flatten(1) for i in indices]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        return Reading(ids, prompt, length, padded(places), padded([len(self.layers)]))


class LiveStates:
    """The same without a disk: the target reads each batch when it is asked for, which on a GPU is the quicker way."""

    def __init__(self, target: FrozenLlama, data: list[str], layers: tuple[int, ...], max_length: int) -> None:
        self._target, self.layers = target, layers
        self.records = sorted(read_corpus(data, max_length), key=len)

    def reading(self, indices: list[int], layers: tuple[int, ...]) -> Reading:
        return read(self._target, [self.records[i] for i in indices], layers)


def _rows(folder: Path, rows: int, width: int) -> Tensor:
    file = str(folder / "states.bf16")
    return torch.from_file(file, shared=True, size=rows * width, dtype=torch.bfloat16).view(rows, width)


@dataclass
class Progress:
    """`meta.json`. done: records whose rows are on disk."""

    layers: list[int]
    hidden: int
    done: int = 0

    def save(self, folder: Path) -> None:
        part = folder / ".meta.part"
        part.write_text(json.dumps(asdict(self)) + "\n")
        part.replace(folder / "meta.json")


def write(args: argparse.Namespace) -> None:
    folder, layers = Path(args.out), tuple(args.layers)
    folder.mkdir(parents=True, exist_ok=True)
    target = FrozenLlama.from_pretrained(args.model, args.max_length + 16, args.device)
    if not (folder / "meta.json").exists():
        records = sorted(read_corpus(args.data, args.max_length), key=len)
        text = "".join(json.dumps(r.to_json()) + "\n" for r in records)
        (folder / "records.jsonl").write_text(text)
        Progress(list(layers), target.config.hidden_size).save(folder)
    progress = Progress(**json.loads((folder / "meta.json").read_text()))
    if tuple(progress.layers) != layers:
        raise SystemExit(f"error: {folder} holds layers {progress.layers}; choose another --out for {list(layers)}")
    records = read_records(folder / "records.jsonl")
    start = [0, *accumulate(map(len, records))]
    rows = _rows(folder, start[-1], (len(layers) + 1) * progress.hidden)

    def work(at: int) -> int:
        batch = records[at : at + args.sequences]
        reading = read(target, batch, layers)
        for i, length in enumerate(reading.length.tolist()):
            states = torch.cat([reading.features[i, :length], reading.final[i, :length]], -1)
            rows[start[at + i] : start[at + i + 1]] = states.to("cpu", torch.bfloat16)
        return len(batch)

    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=start[-1], unit="token", mininterval=10) as bar:
        bar.update(start[progress.done])
        for count in pool.map(work, range(progress.done, len(records), args.sequences)):
            bar.update(start[progress.done + count] - start[progress.done])
            progress.done += count
            progress.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--data", nargs="+", required=True, help="response files of recipes.generate")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="whose output is kept")
    parser.add_argument("--out", required=True, help="the cache folder; 7 kB a token for SmolLM2")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of prompt and response; longer are left out"
    )
    parser.add_argument("--sequences", type=int, default=4, help="sequences read together")
    parser.add_argument("--workers", type=int, default=2, help="batches in flight, one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two single-threaded workers share a machine better than two-threaded operators
    write(args)


if __name__ == "__main__":
    main()
