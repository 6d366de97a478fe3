"""Let the target model write the draft's training data: batched sampling on CPU or GPU, appended to a JSONL file.

A draft learns to imitate the target on the text the target itself writes, so the data is the target's own responses to
training prompts and to prompts it invents. This file never trains, never fetches a model, and never touches the
evaluation prompts except to refuse them (`--exclude`).

One line per response: `{"prompt_ids": [...], "response_ids": [...], "temperature": t}`. Kill it at any time and start
it again with the same arguments: finished responses stay, and greedy answers are never written twice.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.data import Record, read_prompts, read_records
from recipes.decoder import SlotDecoder

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TEMPERATURES = (0.0, 0.7, 1.0)
CODE_OPENINGS = ("Write a function", "Write a python function", "Write a function to", "Write a python function to")


@dataclass(frozen=True)
class Domain:
    """How often a kind of prompt is drawn, and how often the target invents its ending from the first words."""

    name: str
    share: float
    invented: float
    suffix: float = 0.0


DOMAINS = (
    Domain("chat", 0.25, invented=0.5),
    Domain("code", 0.25, invented=0.5),
    Domain("math", 0.20, invented=0.3, suffix=0.75),
    Domain("free", 0.30, invented=1.0),
)


@dataclass
class Job:
    """One sequence in flight. `inventing` means that the target is still writing the user's turn."""

    ids: list[int]
    temperature: float
    limit: int
    inventing: bool = False
    suffix: str = ""


class PromptSource:
    """An endless, seeded stream of jobs over the domains.

    prompts: of each domain but `free`; excluded: never answered; max_new: tokens of an answer at most
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: dict[str, list[str]],
        excluded: set[str],
        seed: int,
        max_new: int,
    ) -> None:
        self.tokenizer, self.prompts, self.excluded, self.max_new = tokenizer, prompts, excluded, max_new
        self.rng = random.Random(seed)
        self.decks: dict[str, list[str]] = {}
        head, self.tail = self._split_template()
        self.head_ids = tokenizer.encode(head, add_special_tokens=False)

    def _split_template(self) -> tuple[str, str]:
        marker = "\u241f"
        chat = [{"role": "user", "content": marker}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        head, _, tail = text.partition(marker)
        return head, tail

    def _draw(self, domain: str) -> str:
        deck = self.decks.setdefault(domain, [])
        if not deck:
            deck.extend(self.rng.sample(self.prompts[domain], len(self.prompts[domain])))
        return deck.pop()

    def _opening(self, domain: Domain) -> str:
        if domain.name == "free":
            return ""
        if domain.name == "code":
            return self.rng.choice(CODE_OPENINGS)
        words = self._draw(domain.name).split(" ")
        return " ".join(words[: self.rng.randint(2, 8)])

    def answer_job(self, prompt: str) -> Job | None:
        """A job that answers `prompt`; None where the prompt is one of the evaluation prompts."""
        if prompt.removesuffix(BOXED).strip() in self.excluded:
            return None
        text = self.tokenizer.decode(self.head_ids) + prompt + self.tail
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Job(ids, self.rng.choice(TEMPERATURES), self.max_new)

    def __iter__(self) -> Iterator[Job]:
        while True:
            domain = self.rng.choices(DOMAINS, [d.share for d in DOMAINS])[0]
            suffix = BOXED if self.rng.random() < domain.suffix else ""
            if self.rng.random() < domain.invented:
                opening = self.tokenizer.encode(self._opening(domain), add_special_tokens=False)
                yield Job(self.head_ids + opening, 1.0, 64, inventing=True, suffix=suffix)
            elif job := self.answer_job(self._draw(domain.name) + suffix):
                yield job

    def finish_invention(self, job: Job, written: list[int]) -> Job | None:
        """Turn a finished user's turn into the job that answers it; too short an invention is dropped."""
        prompt = self.tokenizer.decode((job.ids + written)[len(self.head_ids) :], skip_special_tokens=True).strip()
        return self.answer_job(prompt + job.suffix) if len(prompt) >= 12 else None


def generate(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = {name: read_prompts(Path(args.prompts) / f"train-{name}.jsonl") for name in ("chat", "code", "math")}
    excluded = {p.strip() for path in args.exclude for p in read_prompts(path)}
    excluded |= {p.removesuffix(BOXED).strip() for p in excluded}
    old = [r for path in [*args.seen, args.out] if Path(path).exists() for r in read_records(path)]
    greedy_seen = {tuple(r.prompt_ids) for r in old if r.temperature == 0.0}
    seed = args.seed + len(old)
    torch.manual_seed(seed)
    source = PromptSource(tokenizer, prompts, excluded, seed, args.max_new)
    fresh = iter(source)
    retry: list[Job] = []

    def next_job() -> Job:
        while True:
            job = retry.pop() if retry else next(fresh)
            if len(job.ids) > args.max_prompt:
                continue
            if job.temperature == 0.0:
                key = tuple(job.ids)
                if key in greedy_seen:
                    job.temperature = random.Random(len(greedy_seen)).choice(TEMPERATURES[1:])
                greedy_seen.add(key)
            return job

    decoder = SlotDecoder.from_pretrained(args.model, args.slots, args.max_prompt + args.max_new, args.device)
    with open(args.out, "a") as sink, tqdm(total=args.tokens, unit="tok", smoothing=0.02, mininterval=10) as bar:
        while bar.n < args.tokens:
            free = decoder.free_slots()
            if len(free) * 16 >= args.slots:
                decoder.admit([next_job() for _ in free])
            for job, written in decoder.step(tokenizer.eos_token_id):
                if job.inventing:
                    if follow_up := source.finish_invention(job, written):
                        retry.append(follow_up)
                elif written:
                    sink.write(json.dumps(Record(job.ids, written, job.temperature).to_json()) + "\n")
                    bar.update(len(written))
            sink.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target checkpoint")
    parser.add_argument("--prompts", required=True, help="folder with train-{chat,code,math}.jsonl")
    parser.add_argument("--exclude", nargs="*", default=[], help="prompt files that must never be answered")
    parser.add_argument("--seen", nargs="*", default=[], help="earlier data whose greedy answers are not repeated")
    parser.add_argument("--out", required=True, help="response file, appended to")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="response tokens to write in this run")
    parser.add_argument("--max-new", type=int, default=192, help="tokens of a response at most")
    parser.add_argument("--max-prompt", type=int, default=256, help="tokens; longer prompts are not answered")
    parser.add_argument("--slots", type=int, default=128, help="responses written at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one process per core shares best")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generate(args)


if __name__ == "__main__":
    main()
