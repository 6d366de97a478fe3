"""Train a draft of any algorithm on what the target thought while it read its own text; on a CPU or one GPU.

Per step: readings out of the cache (`recipes.states`), anchors sampled in the responses, every anchor's next tokens
predicted at once, the target's distributions matched. All algorithms see the same records in the same order with the
same anchors, loss, optimiser and schedule, so that what differs between two drafts is the draft. It never generates
text, never fetches anything, and never sees the evaluation prompts. Kill it at any time: `--resume` goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from recipes.block import DFlashDraft, DSparkDraft
from recipes.corpus import batches, hot_vocabulary, split
from recipes.draft import Draft
from recipes.drafts import ALGORITHMS
from recipes.evaluate import score, summarise
from recipes.llama import FrozenLlama
from recipes.loss import DistributionLoss, LossWeights, hot_probabilities
from recipes.recurrent import Eagle3Draft, MTPDraft
from recipes.shape import Shape
from recipes.states import LAYERS, LiveStates, Reading, StateCache

BLOCK, EAGLE_LAYERS = 6, (10, 22, 28)
"""Draft tokens after an anchor; the three target layers of EAGLE-3, out of the cache's."""

MTP_STEPS = 1
"""An MTP module is trained to predict one token ahead; deeper drafts feed it to itself."""


def new_draft(args: argparse.Namespace, target: FrozenLlama, cache: StateCache | LiveStates, train: list[int]) -> Draft:
    """An untrained draft of the algorithm asked for, started from what the target knows."""
    records = [cache.records[i] for i in train]
    hot, shape = hot_vocabulary(records, args.coverage).to(args.device), Shape.of(target)
    sample = random.Random(args.seed).sample(train, min(32, len(train)))
    torch.manual_seed(args.seed)
    draft: Draft
    if args.algorithm == "mtp":
        draft = MTPDraft(shape, MTP_STEPS, hot)
    elif args.algorithm == "eagle3":
        scale = feature_scale(cache.reading(sample, EAGLE_LAYERS))
        draft = Eagle3Draft(shape, args.block, EAGLE_LAYERS, hot, scale)
    else:
        sizes: dict[str, Any] = {
            "shape": shape, "steps": args.block, "layer_ids": cache.layers, "hot": hot, "layers": args.layers,
            "mask": args.mask_token, "scale": feature_scale(cache.reading(sample, cache.layers)),
        }  # fmt: skip
        draft = DFlashDraft(**sizes) if args.algorithm == "dflash" else DSparkDraft(rank=args.rank, **sizes)
    draft.initialise(target, records)
    return draft.to(args.device)


def feature_scale(reading: Reading) -> Tensor:
    """1 / root mean square of every feature channel, so that no channel drowns the others."""
    real = torch.arange(reading.ids.shape[1])[None] < reading.length[:, None]
    real[:, 0] = False  # the first token's huge activations say nothing about the rest
    return reading.features[real.to(reading.features.device)].float().pow(2).mean(0).rsqrt().cpu()


def sample_anchors(reading: Reading, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Anchors [n, a] (positions of response tokens that have a successor), sorted, and which of them count."""
    n, t = reading.ids.shape
    position = torch.arange(t)
    allowed = (position >= reading.prompt[:, None]) & (position < reading.length[:, None] - 1)
    key = torch.rand(n, t, generator=rng).masked_fill_(~allowed, 2.0)
    wanted = math.ceil(share * int(allowed.sum(1).float().mean()))
    key, anchors = key.sort(1)
    anchors, real = anchors[:, :wanted], key[:, :wanted] < 2.0
    anchors = torch.where(real, anchors, reading.length[:, None] - 1)
    anchors, order = anchors.sort(1)
    return anchors, real.gather(1, order)


@dataclass(frozen=True)
class Figures:
    """Of one micro-batch. overlap: sum of 1 - TV by position; count: rows by position; tokens: response tokens read"""

    loss: float
    overlap: Tensor
    count: Tensor
    tokens: int


class Trainer:
    """Master weights in float32, a bf16 copy that the workers read, gradients summed over micro-batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.weights = args, LossWeights(l1=args.l1, ce=args.ce)
        self.target = FrozenLlama.from_pretrained(args.model, args.max_length + 16, args.device)
        self.cache: StateCache | LiveStates
        if args.cache is not None:
            self.cache = StateCache(Path(args.cache))
        else:
            self.cache = LiveStates(self.target, args.data, LAYERS, args.max_length)
        self.train, self.held = split(self.cache.records)
        if not {0.0, 1.0} <= {self.cache.records[i].temperature for i in self.held}:
            raise SystemExit(
                f"error: {args.cache or args.data}: too few responses to hold some out at temperatures 0 and 1"
            )
        self.draft = new_draft(args, self.target, self.cache, self.train)
        self.head = self.target.head[self.draft.hot].contiguous()
        self.optimisers = self._optimisers()
        self.base_lr = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.step = self.tokens = self.positions = 0
        self.seconds = 0.0
        if args.resume and self.state_path.exists():
            self._restore(torch.load(self.state_path, weights_only=True))
        self.shadow = copy.deepcopy(self.draft).to(self.target.dtype)
        tokens = sum(len(self.cache.records[i].response_ids) for i in self.train)
        size = sum(p.numel() for p in self.draft.parameters())
        print(
            f"{args.algorithm}: {size / 1e6:.1f} M parameters, {len(self.train)} responses, {tokens} response tokens, "
            f"hot vocabulary {len(self.draft.hot)}, {args.tokens / tokens:.1f} passes",
            flush=True,
        )

    @property
    def state_path(self) -> Path:
        return Path(self.args.out) / "state.pt"

    @property
    def progress(self) -> float:
        """Of the tokens, or of the minutes where there is a limit: whichever is further."""
        spent = 0.0 if self.args.minutes is None else self.seconds / (60 * self.args.minutes)
        return min(max(self.tokens / self.args.tokens, spent), 1.0)

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        named = list(self.draft.named_parameters())
        tables = [p for n, p in named if n.startswith(("markov", "confidence"))]
        matrices = [p for n, p in named if p.ndim == 2 and not n.startswith(("markov", "confidence"))]
        norms = [p for n, p in named if p.ndim == 1 and not n.startswith("confidence")]
        lr = self.args.lr
        muons = [
            torch.optim.Muon(part, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            for part in (matrices[::2], matrices[1::2])
        ]
        groups = [{"params": part, "lr": lr} for part in (tables, norms) if part]
        return [*muons, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]

    def micro_batch(self, indices: list[int], seed: int) -> tuple[list[Tensor], Figures]:
        """Gradients of the mean loss of a few records. Safe to run in several threads."""
        draft, steps, device = self.shadow, self.draft.steps, self.target.device
        reading = self.cache.reading(indices, draft.layer_ids)
        anchors, real = sample_anchors(reading, self.args.anchor_share, torch.Generator().manual_seed(seed))
        offsets = torch.arange(1, steps + 1)
        at = anchors[..., None] + offsets
        valid = real[..., None] & (at < reading.length[:, None, None])
        at = at.minimum(reading.length[:, None, None] - 1).to(device)
        position = torch.arange(reading.ids.shape[1])
        # Distributions only where a draft token is predicted: from the first anchor to the last position but one.
        needed = ((position >= reading.prompt[:, None]) & (position < reading.length[:, None] - 1)).to(device)
        reading, anchors = reading.to(device), anchors.to(device)
        p_t = hot_probabilities(reading.final[needed], self.head)
        row_of = needed.flatten().cumsum(0).view_as(needed) - 1
        rows = row_of.gather(1, (at - 1).flatten(1)).flatten()
        weight = (torch.exp(-(offsets - 1) / self.weights.decay) * valid).flatten().to(device)
        weight = weight / weight.sum().clamp(min=1)
        blocks = draft(reading, anchors, self.target.embedding)
        loss, tv = DistributionLoss.apply(
            blocks.hidden, blocks.latent, draft.w2, self.head, p_t, rows, weight, self.weights.l1, self.weights.ce
        )
        total, logit = loss, draft.confidence_logit(blocks)
        if logit is not None:
            bce = F.binary_cross_entropy_with_logits(logit.float(), 1 - tv, weight=weight, reduction="sum")
            total = total + self.weights.confidence * bce
        gradients = torch.autograd.grad(total, list(draft.parameters()))
        seen = valid.view(-1, steps)
        overlap = ((1 - tv).view(-1, steps).cpu() * seen).sum(0)
        tokens = sum(len(self.cache.records[i].response_ids) for i in indices)
        return list(gradients), Figures(loss.item(), overlap, seen.sum(0), tokens)

    def apply(self, gradients: list[list[Tensor]], pool: ThreadPoolExecutor) -> None:
        for parameter, *parts in zip(self.draft.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack([p.float() for p in parts]).mean(0)
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        # Linear warm-up, then linear decay over the tokens that are left.
        factor = min(1.0, (self.step + 1) / self.args.warmup) * (1.0 - self.progress)
        for optimiser, base in zip(self.optimisers, self.base_lr, strict=True):
            for group, lr in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = lr * factor
        list(pool.map(lambda optimiser: optimiser.step(), self.optimisers))
        with torch.no_grad():
            for low, full in zip(self.shadow.parameters(), self.draft.parameters(), strict=True):
                low.copy_(full)

    def report(self, pool: ThreadPoolExecutor) -> dict[str, Any]:
        """Held-out figures: per-position overlap, expected and greedy accepted lengths."""

        def one(i: int) -> Any:
            reading = self.cache.reading([i], self.shadow.layer_ids).to(self.target.device)
            return score(self.shadow, self.target, reading)

        scores = list(pool.map(one, self.held))
        temperatures = [self.cache.records[i].temperature for i in self.held]
        hot = summarise([s for s, t in zip(scores, temperatures, strict=True) if t == 1.0], 1.0)
        cold = summarise([s for s, t in zip(scores, temperatures, strict=True) if t == 0.0], 0.0)
        return {
            "step": self.step, "seconds": round(self.seconds), "tokens": self.tokens, "positions": self.positions,
            "overlap": hot["overlap_by_position"], "length_t1": hot["accepted_length"],
            "expected_t1": hot["expected_length_all_anchors"], "length_t0": cold["accepted_length"],
            "match_t0": cold["acceptance_by_position"],
        }  # fmt: skip

    def save(self) -> None:
        state = {
            "draft": self.draft.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step, "tokens": self.tokens, "positions": self.positions, "seconds": self.seconds,
        }  # fmt: skip
        part = self.state_path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state_path)
        self.draft.export(Path(self.args.out) / "draft", self.target.head)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.draft.load_state_dict(saved["draft"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.positions, self.seconds = saved["positions"], saved["seconds"]

    def run(self) -> None:
        args, records = self.args, [self.cache.records[i] for i in self.train]
        stream = batches(records, args.sequences, args.seed)
        for _ in range(self.step * args.accumulate):  # where the run before stopped
            next(stream)
        begun, earlier = time.monotonic(), self.seconds
        last_report = earlier
        curve = Path(args.out) / "curve.jsonl"
        self.micro_batch(self.train[:1], 0)  # compiles the loss before there are threads to race for it
        with ThreadPoolExecutor(args.workers) as pool, tqdm(total=args.tokens, unit="token", mininterval=10) as bar:
            bar.update(self.tokens)
            while self.progress < 1.0:
                seeds = [args.seed + self.step * args.accumulate + i for i in range(args.accumulate)]
                chosen = [[self.train[i] for i in next(stream)] for _ in seeds]
                gradients, figures = zip(*pool.map(self.micro_batch, chosen, seeds), strict=True)
                self.apply(list(gradients), pool)
                count, overlap = sum(f.count for f in figures), sum(f.overlap for f in figures)
                overlap = overlap / count.clamp(min=1)
                read = sum(f.tokens for f in figures)
                self.step, self.tokens = self.step + 1, self.tokens + read
                self.positions += int(count.sum())
                self.seconds = earlier + time.monotonic() - begun
                bar.update(read)
                loss = sum(f.loss for f in figures) / len(figures)
                bar.set_postfix_str(f"loss {loss:.3f} overlap {overlap[0]:.3f} {overlap.mean():.3f}", refresh=False)
                if self.seconds - last_report > args.report_every * 60 or self.progress >= 1.0:
                    last_report = self.seconds
                    line = json.dumps(self.report(pool))
                    bar.write(line)
                    with open(curve, "a") as sink:
                        sink.write(line + "\n")
                    self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=tuple(ALGORITHMS), required=True)
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", help="folder of recipes.states")
    source.add_argument("--data", nargs="+", help="response files, which the target reads as it goes: on a GPU")
    parser.add_argument("--out", required=True, help="folder for state.pt, curve.jsonl and draft/")
    parser.add_argument("--tokens", type=int, default=600_000, help="response tokens to read, repeats included")
    parser.add_argument("--minutes", type=float, help="stop by then, the learning rate at zero, whatever has been read")
    parser.add_argument("--resume", action="store_true", help="go on from state.pt, where there is one")
    parser.add_argument("--layers", type=int, default=2, help="of a DSpark or DFlash draft")
    parser.add_argument("--block", type=int, default=BLOCK, help="draft tokens after an anchor")
    parser.add_argument("--rank", type=int, default=32, help="of DSpark's Markov head")
    parser.add_argument("--mask-token", type=int, default=4, help="a special token the target never writes")
    parser.add_argument("--coverage", type=float, default=0.98, help="share of response tokens in the hot vocabulary")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of a response with its prompt; longer ones are left out"
    )
    parser.add_argument("--sequences", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--anchor-share", type=float, default=0.25, help="anchors per response token")
    parser.add_argument("--lr", type=float, default=8e-3, help="at its highest, after the warm-up")
    parser.add_argument("--l1", type=float, default=0.9, help="weight of the distance of the distributions")
    parser.add_argument("--ce", type=float, default=0.3, help="weight of the cross entropy")
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--report-every", type=float, default=5, help="minutes")
    parser.add_argument("--workers", type=int, default=2, help="micro-batches in flight, one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    # One thread an operator: two single-threaded workers share a busy machine far better than two-threaded operators.
    torch.set_num_threads(1)
    Trainer(args).run()


if __name__ == "__main__":
    main()
