"""Measure a draft offline: the accepted length it would reach, exactly, from text the target has already written.

Accepted draft tokens ARE the target's text, so every quantity a chain needs can be read off that text in one pass over
all anchors: greedily a draft token is accepted where its argmax is the token written; at temperature 1 the token x that
the target drew was the draft's own with probability min(1, p_d(x) / p_t(x)). Walking the text with these gives the
rounds of real speculative decoding. Nothing here trains, and the evaluation prompts never leave this file.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from recipes.data import Record, read_domains
from recipes.decoder import SlotDecoder
from recipes.draft import Draft
from recipes.drafts import load_draft
from recipes.generate import Job
from recipes.llama import FrozenLlama
from recipes.states import Reading, read


@dataclass(frozen=True)
class Scores:
    """Per anchor [a] of one response and draft position [gamma], teacher-forced; rows near the end hold fewer."""

    match: Tensor  # bool: the draft's argmax is the token written
    ratio: Tensor  # min(1, p_d(x) / p_t(x)) of the token x written
    overlap: Tensor  # 1 - TV(p_d, p_t) at temperature 1, over the whole vocabulary
    confidence: Tensor | None  # the confidence head's probability, where the draft has one
    valid: Tensor  # bool: position exists in the text


@torch.no_grad()
def score(draft: Draft, target: FrozenLlama, reading: Reading) -> Scores:
    """Scores of every anchor of one response, from its first token on. `draft` in the target's dtype."""
    ids, first, length, steps = reading.ids, int(reading.prompt[0]), reading.ids.shape[1], draft.steps
    anchors = torch.arange(first, length - 1, device=ids.device)[None]
    blocks = draft(reading, anchors, target.embedding)
    at = anchors[0][:, None] + torch.arange(1, steps + 1, device=ids.device)  # the position each row predicts
    valid, at = at < length, at.clamp(max=length - 1)
    full = F.linear(reading.final[0, first : length - 1], target.head).float().softmax(-1)  # positions first + 1 ..
    p_t = full[:, draft.hot]
    tokens, rows = ids[0, at], (at - 1 - first)
    column = torch.searchsorted(draft.hot, tokens).clamp(max=len(draft.hot) - 1)
    is_hot = draft.hot[column] == tokens
    head, bias = target.head[draft.hot], draft.w2.to(target.dtype)
    match, chance, overlap = [], [], []
    every = torch.arange(len(blocks.hidden), device=ids.device)
    for part, row in zip(every.split(384), rows.flatten().split(384), strict=True):
        p_d = torch.addmm(blocks.hidden[part] @ head.T, blocks.latent[part], bias.T).float().softmax(-1)
        overlap.append(torch.minimum(p_d, p_t[row]).sum(-1))
        match.append(p_d.argmax(-1) == column.flatten()[part])
        chance.append(p_d.gather(1, column.flatten()[part, None])[:, 0])
    shape = rows.shape
    drawn = full[rows, tokens].clamp(min=1e-9)
    ratio = (torch.cat(chance).view(shape) / drawn).clamp(max=1.0) * is_hot
    logit = draft.confidence_logit(blocks)
    confidence = None if logit is None else logit.float().sigmoid().view(shape)
    return Scores(torch.cat(match).view(shape) & is_hot, ratio, torch.cat(overlap).view(shape), confidence, valid)


def walk(scores: Scores, temperature: float, seed: int) -> list[tuple[int, int]]:
    """(anchor, accepted drafts) of every round of chain speculative decoding along one response.

    Greedy for temperature 0; for 1 each draft token survives with its `ratio`. A round at anchor i that accepts n
    drafts yields n + 1 tokens, and the next anchor is i + n + 1.
    """
    u = torch.rand(scores.ratio.shape, generator=torch.Generator().manual_seed(seed)).to(scores.ratio.device)
    keep = scores.match if temperature == 0 else scores.ratio > u
    survive = (keep & scores.valid).long().cumprod(-1).sum(-1).tolist()
    rounds, at = [], 0
    while at < len(survive):
        rounds.append((at, survive[at]))
        at += survive[at] + 1
    return rounds


def summarise(items: list[Scores], temperature: float) -> dict[str, Any]:
    """Accepted length (bonus included), conditional acceptance by position, and the confidence head's bias."""
    tokens = rounds = 0
    gamma = items[0].match.shape[1]
    reached, accepted = torch.zeros(gamma), torch.zeros(gamma)
    for seed, scores in enumerate(items):
        for at, n in walk(scores, temperature, seed):
            possible = int(scores.valid[at].sum())
            # Where the text ends with an accepted draft there is no bonus behind it.
            rounds, tokens = rounds + 1, tokens + min(n + 1, len(scores.valid) - at)
            reached[: min(n + 1, possible)] += 1
            accepted[:n] += 1
    valid = torch.cat([s.valid for s in items])
    overlap = torch.cat([s.overlap for s in items]) * valid
    survival = torch.where(valid, overlap, 0.0).cumprod(-1)[valid.all(-1)]
    result = {
        "accepted_length": round(tokens / max(rounds, 1), 4),
        "tokens": tokens,
        "rounds": rounds,
        "acceptance_by_position": [round(x, 4) for x in (accepted / reached.clamp(min=1)).tolist()],
        "overlap_by_position": [round(x, 4) for x in (overlap.sum(0) / valid.sum(0)).tolist()],
        "expected_length_all_anchors": round(1 + survival.sum(-1).mean().item(), 4),
    }
    said = [s.confidence for s in items if s.confidence is not None]
    if said:
        mean = (torch.cat(said) * valid).sum(0) / valid.sum(0)
        result["confidence_by_position"] = [round(x, 4) for x in mean.tolist()]
    return result


def write_responses(args: argparse.Namespace, temperature: float, path: Path) -> None:
    """Let the target answer every evaluation prompt once; kept in a file outside the training data."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(7)
    jobs, domain_of = [], {}
    for domain, prompt in read_domains(args.prompts):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        jobs.append(Job(tokenizer.encode(text, add_special_tokens=False), temperature, args.max_new))
        domain_of[id(jobs[-1])] = domain
    longest = max(len(job.ids) for job in jobs)
    decoder = SlotDecoder.from_pretrained(args.model, 96, longest + args.max_new, args.device)
    total = len(jobs)
    with open(path.with_suffix(".part"), "w") as sink, tqdm(total=total, desc=f"target, T={temperature:g}") as bar:
        while bar.n < total:
            batch = [jobs.pop() for _ in decoder.free_slots()[: len(jobs)]]
            decoder.admit(batch)
            for job, written in decoder.step(tokenizer.eos_token_id):
                row = Record(job.ids, written, temperature).to_json() | {"domain": domain_of[id(job)]}
                sink.write(json.dumps(row) + "\n")
                bar.update()
    path.with_suffix(".part").replace(path)


def load_responses(path: Path) -> list[tuple[str, Record]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["domain"], Record(r["prompt_ids"], r["response_ids"], r["temperature"])) for r in rows]


def evaluate(
    draft: Draft, target: FrozenLlama, responses: list[tuple[str, Record]], temperature: float, workers: int
) -> dict[str, Any]:
    """`overall` and per-domain summaries over the target's responses at one temperature."""
    todo = [(domain, record) for domain, record in responses if len(record.response_ids) > 1]
    with ThreadPoolExecutor(workers) as pool:
        work = pool.map(lambda item: score(draft, target, read(target, [item[1]], draft.layer_ids)), todo)
        items = list(tqdm(work, total=len(todo), desc=f"draft, T={temperature:g}", mininterval=10))
    by_domain: dict[str, list[Scores]] = {}
    for (domain, _), scores in zip(todo, items, strict=True):
        by_domain.setdefault(domain, []).append(scores)
    return {
        "overall": summarise(items, temperature),
        "domains": {name: summarise(part, temperature) for name, part in sorted(by_domain.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--draft", required=True, help="folder of the exported draft")
    parser.add_argument("--prompts", required=True, help="JSONL with domain and prompt")
    parser.add_argument("--cache", required=True, help="folder for the target's responses")
    parser.add_argument("--max-new", type=int, default=128, help="tokens of a response at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="responses in flight, one thread each")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = FrozenLlama.from_pretrained(args.model, 2048, args.device)
    draft = load_draft(Path(args.draft)).to(args.device, target.dtype)
    result: dict[str, Any] = {"prompts": len(read_domains(args.prompts))}
    for temperature in (0.0, 1.0):
        path = Path(args.cache) / f"eval-t{temperature:g}-n{args.max_new}.jsonl"
        if not path.exists():
            write_responses(args, temperature, path)
        result[f"temperature_{temperature:g}"] = evaluate(
            draft, target, load_responses(path), temperature, args.workers
        )
    text = json.dumps(result, indent=2)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
