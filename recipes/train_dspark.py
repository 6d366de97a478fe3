"""Train a DSpark draft for a Llama target on responses the target wrote itself; on a CPU in an hour or two.

Per step: read whole sequences with the frozen target (features and next-token distributions, nothing cached), sample
anchors in the responses, draft all blocks in parallel, match the target's distributions. It never generates text, never
fetches anything, and never sees the evaluation prompts. Kill it at any time: `--resume` continues from the last
checkpoint, and new lines in the data files are picked up at every epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from recipes.corpus import Batch, Corpus, bigram_factors, hot_vocabulary
from recipes.data import Record
from recipes.draft import Draft, DraftConfig
from recipes.evaluate import embed_blocks, score, summarise
from recipes.llama import FrozenLlama
from recipes.loss import DistributionLoss, LossWeights, hot_probabilities


def feature_scale(target: FrozenLlama, batch: Batch, layers: tuple[int, ...]) -> Tensor:
    """1 / root mean square of every feature channel over a batch, so that no channel drowns the others."""
    _, features = target.read(batch.ids.to(target.device), layers)
    real = torch.arange(batch.ids.shape[1])[None] < batch.length[:, None]
    real[:, 0] = False  # the first token's huge activations say nothing about the rest
    return features[real.to(target.device)].float().pow(2).mean(0).rsqrt()


class Trainer:
    """Master weights in float32, a bf16 copy that the workers read, gradients summed over micro-batches."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.weights = args, LossWeights(l1=args.l1, ce=args.ce)
        self.target = FrozenLlama.from_pretrained(args.model, args.max_length + 16, args.device)
        self.corpus = Corpus(args.data, args.max_length)
        train, self.held = self.corpus.load()
        self.step, self.progress, self.positions, self.seconds = 0, 0.0, 0, 0.0
        self.saved = torch.load(self.state_path, weights_only=True) if args.resume else None
        if self.saved:
            self.draft = self._new_draft(self.saved["draft"]["hot"], self.saved["draft"]["feature_scale"])
            self.draft.load_state_dict(self.saved["draft"])
            self.step, self.progress = self.saved["step"], self.saved["progress"]
            self.positions, self.seconds = self.saved["positions"], self.saved["seconds"]
        else:
            hot = hot_vocabulary(train, args.coverage)
            scale_batch = Batch.of(random.Random(args.seed).sample(train, min(32, len(train))))
            self.draft = self._new_draft(hot, feature_scale(self.target, scale_batch, tuple(args.target_layers)))
            self._initialise(train)
        tokens = sum(len(r.response_ids) for r in train)
        print(f"{len(train)} responses, {tokens} response tokens, hot vocabulary {len(self.draft.hot)}", flush=True)
        self.head = self.target.head[self.draft.hot].contiguous()
        self.shadow = copy.deepcopy(self.draft).to(self.target.dtype)
        self.optimisers = self._optimisers()
        if self.saved:
            for optimiser, state in zip(self.optimisers, self.saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
        self.base_lr = [[g["lr"] for g in o.param_groups] for o in self.optimisers]
        if self.saved:
            self.base_lr = self.saved["base_lr"]

    @property
    def state_path(self) -> Path:
        return Path(self.args.out) / "state.pt"

    def _new_draft(self, hot: Tensor, scale: Tensor) -> Draft:
        t, args = self.target.config, self.args
        cfg = DraftConfig(
            layers=args.layers, block=args.block, markov_rank=args.rank, target_layer_ids=tuple(args.target_layers),
            mask_token_id=args.mask_token, num_target_layers=t.num_hidden_layers, vocab=t.vocab_size,
            hidden=t.hidden_size, intermediate=t.intermediate_size, heads=t.num_attention_heads,
            kv_heads=t.num_key_value_heads, head_dim=t.head_dim, eps=float(t.rms_norm_eps),
            theta=self.target.theta, max_positions=t.max_position_embeddings,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        return Draft(cfg, hot.to(args.device), scale.to(args.device)).to(args.device)

    @torch.no_grad()
    def _initialise(self, train: list[Record]) -> None:
        """Layers from the target's own, `fc` as its last captured feature, the Markov head from bigram counts."""
        draft, cfg = self.draft, self.draft.cfg
        if self.args.init_layers:
            for layer, i in zip(draft.layers, self.args.init_layers, strict=True):
                source, att = self.target.layers[i], layer.self_attn
                sizes = [att.q_proj.out_features, att.k_proj.out_features, att.v_proj.out_features]
                for proj, weight in zip((att.q_proj, att.k_proj, att.v_proj), source.qkv.split(sizes), strict=True):
                    proj.weight.copy_(weight)
                att.o_proj.weight.copy_(source.out)
                gate, up = source.gate_up.chunk(2)
                layer.mlp.gate_proj.weight.copy_(gate)
                layer.mlp.up_proj.weight.copy_(up)
                layer.mlp.down_proj.weight.copy_(source.down)
                layer.input_layernorm.weight.copy_(source.norm1)
                layer.post_attention_layernorm.weight.copy_(source.norm2)
            draft.hidden_norm.weight.copy_(self.target.layers[self.args.init_layers[-1]].norm1)
        draft.norm.weight.copy_(self.target.norm)
        draft.fc.weight.mul_(0.3)
        last = slice(-cfg.hidden, None)
        draft.fc.weight[:, last] += torch.diag(1 / draft.feature_scale[last]) / (1 / draft.feature_scale[last]).std()
        w1, w2, unigram = bigram_factors(train, draft.hot.cpu(), cfg.vocab, cfg.markov_rank - 1)
        draft.markov_w1.copy_(w1 + 0.01 * torch.randn_like(w1))
        draft.markov_w2[:, :-1].copy_(w2)
        draft.markov_w2[:, -1].copy_(0.5 * (unigram - unigram.mean()))

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        named = list(self.draft.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and (n.startswith("layers") or n == "fc.weight")]
        tables = [p for n, p in named if n.startswith(("markov", "confidence"))]
        norms = [p for n, p in named if p.ndim == 1 and not n.startswith("confidence")]
        args = self.args
        muons = [
            torch.optim.Muon(part, lr=args.lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            for part in (matrices[::2], matrices[1::2])
        ]
        adam = torch.optim.AdamW(
            [{"params": tables, "lr": args.lr}, {"params": norms, "lr": args.lr}], betas=(0.9, 0.98), weight_decay=0.0
        )
        return [*muons, adam]

    def sample_anchors(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Anchors [n, a] (positions of response tokens that have a successor), sorted, and which of them count."""
        n, t = batch.ids.shape
        position = torch.arange(t)
        allowed = (position >= batch.prompt[:, None]) & (position < batch.length[:, None] - 1)
        key = torch.rand(n, t, generator=rng).masked_fill_(~allowed, 2.0)
        wanted = math.ceil(self.args.anchor_share * int(allowed.sum(1).float().mean()))
        key, anchors = key.sort(1)
        anchors, real = anchors[:, :wanted], key[:, :wanted] < 2.0
        anchors = torch.where(real, anchors, batch.length[:, None] - 1)
        anchors, order = anchors.sort(1)
        return anchors, real.gather(1, order)

    def micro_batch(self, batch: Batch, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients of the mean loss of one micro-batch, and its figures. Safe to run in several threads."""
        draft, target, gamma, device = self.shadow, self.target, self.draft.cfg.block, self.target.device
        anchors, real = self.sample_anchors(batch, torch.Generator().manual_seed(seed))
        offsets = torch.arange(1, gamma + 1)
        at = anchors[..., None] + offsets
        valid = real[..., None] & (at < batch.length[:, None, None])
        at = at.minimum(batch.length[:, None, None] - 1).to(device)
        ids, anchors = batch.ids.to(device), anchors.to(device)
        final, features = target.read(ids, draft.cfg.target_layer_ids)
        # Distributions only where a draft token is predicted: the positions from the first anchor to the last but one.
        position = torch.arange(ids.shape[1])
        needed = ((position >= batch.prompt[:, None]) & (position < batch.length[:, None] - 1)).to(device)
        row_of = needed.flatten().cumsum(0).view_as(needed) - 1
        p_t = hot_probabilities(final[needed], self.head)
        rows = row_of.gather(1, (at - 1).flatten(1)).flatten()
        weight = (torch.exp(-(offsets - 1) / self.weights.decay) * valid).flatten().to(device)
        weight = weight / weight.sum().clamp(min=1)
        hidden = draft.backbone(embed_blocks(draft, target, ids, anchors), anchors, features).flatten(0, 1)
        latent = draft.latent(ids.gather(1, (at - 1).flatten(1)).flatten())
        loss, tv = DistributionLoss.apply(
            hidden, latent, draft.markov_w2, self.head, p_t, rows, weight, self.weights.l1, self.weights.ce
        )
        logit = draft.confidence_logit(hidden, latent).float()
        bce = F.binary_cross_entropy_with_logits(logit, 1 - tv, weight=weight, reduction="sum")
        grads = torch.autograd.grad(loss + self.weights.confidence * bce, list(draft.parameters()))
        overlap = ((1 - tv).view(-1, gamma) * valid.view(-1, gamma).to(device)).sum(0)
        return list(grads), {"loss": loss.detach(), "overlap": overlap, "count": valid.view(-1, gamma).sum(0)}

    def set_lr(self) -> None:
        """Linear warm-up over the first steps, then linear decay of what is left of the time."""
        factor = min(1.0, (self.step + 1) / self.args.warmup) * max(1.0 - self.progress, 0.0)
        for optimiser, base in zip(self.optimisers, self.base_lr, strict=True):
            for group, lr in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = lr * factor

    def apply(self, gradients: list[list[Tensor]], pool: ThreadPoolExecutor) -> None:
        for parameter, *parts in zip(self.draft.parameters(), *gradients, strict=True):
            parameter.grad = sum(p.float() for p in parts) / len(parts)
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        self.set_lr()
        list(pool.map(lambda optimiser: optimiser.step(), self.optimisers))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        for low, full in zip(self.shadow.parameters(), self.draft.parameters(), strict=True):
            low.copy_(full)

    def report(self, pool: ThreadPoolExecutor) -> dict:
        """Held-out figures: per-position overlap, expected and greedy accepted lengths."""
        items = list(pool.map(lambda r: score(self.shadow, self.target, r), self.held))
        cold = [s for s, r in zip(items, self.held, strict=True) if r.temperature == 0.0]
        hot = [s for s, r in zip(items, self.held, strict=True) if r.temperature == 1.0]
        sampled, greedy = summarise(hot, 1.0), summarise(cold, 0.0)
        return {
            "step": self.step, "seconds": round(self.seconds), "positions": self.positions,
            "overlap": sampled["overlap_by_position"], "confidence": sampled["confidence_by_position"],
            "length_t1": sampled["accepted_length"], "expected_t1": sampled["expected_length_all_anchors"],
            "length_t0": greedy["accepted_length"], "match_t0": greedy["acceptance_by_position"],
        }  # fmt: skip

    def save(self) -> None:
        part = self.state_path.with_suffix(".part")
        torch.save(
            {
                "draft": self.draft.state_dict(),
                "optimisers": [o.state_dict() for o in self.optimisers],
                "base_lr": self.base_lr,
                "step": self.step,
                "progress": self.progress,
                "positions": self.positions,
                "seconds": self.seconds,
            },
            part,
        )
        part.replace(self.state_path)
        self.draft.export(Path(self.args.out) / "draft")

    def run(self) -> None:
        args = self.args
        batches = self.corpus.batches(args.sequences, args.seed + self.step)
        begun, resumed_at, earlier = time.monotonic(), self.progress, self.seconds
        budget, last_report = args.minutes * 60, 0.0
        curve = Path(args.out) / "curve.jsonl"
        # Compiles the loss before there are threads to race for it.
        self.micro_batch(next(batches), 0)
        with ThreadPoolExecutor(args.workers) as pool, tqdm(unit="step", mininterval=10) as bar:
            while self.progress < 1.0:
                seeds = [args.seed + self.step * args.accumulate + i for i in range(args.accumulate)]
                jobs = [pool.submit(self.micro_batch, next(batches), seed) for seed in seeds]
                gradients, figures = zip(*(job.result() for job in jobs), strict=True)
                self.apply(list(gradients), pool)
                count = sum(f["count"] for f in figures)
                overlap = sum(f["overlap"].cpu() for f in figures) / count.clamp(min=1)
                self.step, self.positions = self.step + 1, self.positions + int(count.sum())
                elapsed = time.monotonic() - begun
                self.seconds = earlier + elapsed
                self.progress = resumed_at + (1 - resumed_at) * min(elapsed / budget, 1.0)
                bar.update()
                loss = sum(f["loss"] for f in figures) / len(figures)
                bar.set_postfix_str(f"loss {loss:.3f} overlap {overlap[0]:.3f} {overlap.mean():.3f}", refresh=False)
                if elapsed - last_report > args.report_every * 60 or self.progress >= 1.0:
                    last_report = elapsed
                    line = json.dumps(self.report(pool))
                    bar.write(line)
                    with open(curve, "a") as sink:
                        sink.write(line + "\n")
                    self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--data", nargs="+", required=True, help="response files; they may still be growing")
    parser.add_argument("--out", required=True, help="folder for state.pt, curve.jsonl and draft/")
    parser.add_argument("--minutes", type=float, default=90, help="the learning rate reaches zero after this long")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--target-layers", type=int, nargs="+", default=[10, 17, 22, 26, 28])
    parser.add_argument("--init-layers", type=int, nargs="*", default=[0, 29])
    parser.add_argument("--mask-token", type=int, default=4)
    parser.add_argument("--coverage", type=float, default=0.98, help="share of response tokens in the hot vocabulary")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--anchor-share", type=float, default=0.4, help="anchors per response token")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--l1", type=float, default=0.9)
    parser.add_argument("--ce", type=float, default=0.3)
    parser.add_argument("--warmup", type=int, default=20)
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
