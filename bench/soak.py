"""Mixed load: random lengths, shared prefixes and dropped requests, checked against plain decoding and for leaks.

    python -m bench.soak [--requests 500] [--concurrency 16] [--seed 0]

float32, chunks of 64 tokens, a KV pool too small for everyone. Survivors are greedy and must be a prefix of what plain
SGLang writes. Exits 1 when one is not, when a request fails, or when SGLang finds a KV or request slot missing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .prompts import eval_prompts

ARGUMENTS = ("--dtype", "float32", "--chunked-prefill-size", "64", "--max-total-tokens", "3000")
SPECULATE = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", "fixed-7")
PROMPTS, LONGEST = 24, 160


def drop(server: Server, prompt: str, lines: int) -> None:
    """Start to stream and hang up after a few lines."""
    params = {"temperature": 0.8, "max_new_tokens": LONGEST, "ignore_eos": True}
    body = json.dumps({"text": prompt, "stream": True, "sampling_params": params}).encode()
    request = urllib.request.Request(server.url + "/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        for _ in range(lines):
            response.readline()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = [prompt.text for prompt in eval_prompts(PROMPTS)]
    model = ["--model-path", str(make_target()), *ARGUMENTS]
    params = {"temperature": 0, "max_new_tokens": LONGEST, "ignore_eos": True}
    with Server(model) as server, ThreadPoolExecutor(8) as pool:
        work = pool.map(lambda prompt: server.generate(prompt, **params).tokens, prompts)
        wanted = list(tqdm(work, total=PROMPTS, desc="plain"))

    with Server([*model, *SPECULATE]) as server, ThreadPoolExecutor(options.concurrency) as pool:

        def ask(index: int) -> str | None:
            dice = random.Random(f"{options.seed} {index}")
            which, count = dice.randrange(PROMPTS), dice.randint(1, LONGEST)
            if dice.random() < 0.3:
                drop(server, prompts[which], dice.randint(1, 30))
                return None
            got = server.generate(prompts[which], **{**params, "max_new_tokens": count}).tokens
            return None if got == wanted[which][:count] else f"request {index}: prompt {which}, {count} tokens differ"

        problems = [p for p in tqdm(pool.map(ask, range(options.requests)), total=options.requests, desc="mixed") if p]
        time.sleep(5)  # idle: SGLang now counts its slots, and ends the server when one is missing
        server.generate(prompts[0], **{**params, "max_new_tokens": 8})
        server.flush()
        retractions = server.log.count("etract")
    for problem in problems:
        print(problem)
    print(f"{options.requests} requests, {len(problems)} wrong, {retractions} lines of the log speak of retraction")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
