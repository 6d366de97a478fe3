"""Accepted length on the evaluation prompts, by domain and position, from a real server.

    python -m bench.accept [--temperature 0] [--prompts 240] [--tokens 128] [--concurrency 8] [--json OUT]

Lengths count the bonus token: tokens emitted per verify round.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_sgl.server import Answer, Server
from dspark_sgl.target import make_target

from .prompts import eval_prompts


def summary(answers: list[Answer]) -> dict[str, Any]:
    """accepted_length, and the share of rounds in which draft k was accepted given that k - 1 was."""
    drafts: Counter[int] = Counter()
    for answer in answers:
        for accepted, rounds in enumerate(answer.meta["spec_correct_drafts_histogram"]):
            drafts[accepted] += rounds
    rounds, block = sum(drafts.values()), max(drafts)
    at_least = [sum(n for accepted, n in drafts.items() if accepted >= k) for k in range(block + 1)]
    tokens = sum((accepted + 1) * n for accepted, n in drafts.items())
    conditional = [round(at_least[k] / at_least[k - 1], 3) for k in range(1, block + 1) if at_least[k - 1]]
    return {"accepted_length": tokens / rounds, "rounds": rounds, "tokens": tokens, "by_position": conditional}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = eval_prompts(options.prompts)
    arguments = ["--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", "fixed-7"]
    with (
        Server(["--model-path", str(make_target()), *arguments]) as server,
        ThreadPoolExecutor(options.concurrency) as pool,
    ):
        params = {"temperature": options.temperature, "max_new_tokens": options.tokens}
        work = pool.map(lambda prompt: server.generate(prompt.text, **params), prompts)
        answers = list(tqdm(work, total=len(prompts)))
    domains = sorted({prompt.domain for prompt in prompts})
    result = {
        "temperature": options.temperature,
        "overall": summary(answers),
        "domains": {
            name: summary([a for a, p in zip(answers, prompts, strict=True) if p.domain == name]) for name in domains
        },
    }
    for name, row in [("overall", result["overall"]), *result["domains"].items()]:
        print(
            f"{name:>8}: accepted length {row['accepted_length']:.3f} over {row['rounds']} rounds; "
            f"by position {row['by_position']}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
