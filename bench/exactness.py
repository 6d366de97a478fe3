"""Outputs with DSpark against plain SGLang's, token for token, in float32 on the same attention backend.

    python -m bench.exactness [--prompts 200] [--tokens 128] [--depths 1,3,7] [--trees tree-16] [--concurrency 1,8]
                              [--deterministic [--temperature T]] [--json OUT]

Radix cache on, prefill in chunks of 64 tokens. One plain server gives the reference, eight answers at a time; one
speculating server gives the rest: chains of these depths, then whole trees by policies of `bench/policies`. The plain
server answers once more as a control: where its own answers differ, no speculation was at work. Where an answer parts
from the reference, plain decoding is asked how near its two best tokens were: in float32 a logit is known to some 1e-5,
and of two nearer than that the batch decides. Exits 1 when an output differs anywhere else.

With `--deterministic` both servers are started with `--enable-deterministic-inference`: chains only, whose outputs may
differ nowhere, at any temperature.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .common import POLICIES, SPECULATE, ask_all
from .prompts import eval_prompts

ARGUMENTS = ("--dtype", "float32", "--chunked-prefill-size", "64", "--max-total-tokens", "30000")
CHAINS = "version: 1\nname: chains\nschedule: {kind: fixed, depth: 64}\n"
TIE = 1e-4
"""Of two log-probabilities of plain decoding, in float32."""
Arm = tuple[str, str, dict[str, int]]
"""Its name, its policy (empty: the plain server) and what each request asks for."""


def generate(
    server: Server, prompts: Sequence[str], concurrency: int, label: str, **params: Any
) -> list[tuple[int, ...]]:
    return ask_all(lambda prompt: server.generate(prompt, **params).tokens, prompts, concurrency, label)


def gap(plain: Server, prompt: str, got: Sequence[int], wanted: Sequence[int]) -> float:
    """How far plain decoding's two best tokens lie apart where the answers part."""
    place = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return math.inf  # one has ended before the other
    sampling = {"temperature": 0, "max_new_tokens": place + 1}
    body = {"text": prompt, "return_logprob": True, "top_logprobs_num": 2, "sampling_params": sampling}
    tops = plain.post("/generate", body)["meta_info"]["output_top_logprobs"]
    return abs(tops[place][0][0] - tops[place][1][0]) if place < len(tops) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--depths", default="1,3,7", metavar="N,..", help="of chains (default: %(default)s)")
    parser.add_argument(
        "--trees", default="tree-16", metavar="NAME,..", help="of bench/policies (default: %(default)s)"
    )
    parser.add_argument("--concurrency", default="1,8", metavar="N,..", help="users at once (default: %(default)s)")
    parser.add_argument("--no-control", action="store_true", help="plain decoding answers once only")
    parser.add_argument("--deterministic", action="store_true", help="on both servers; without trees")
    parser.add_argument("--temperature", type=float, default=0.0, help="with --deterministic (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    if options.temperature and not options.deterministic:
        parser.error("--temperature compares draws, which only --deterministic ties to a seed")
    unwind_when_told_to_end()
    prompts = [prompt.text for prompt in eval_prompts(options.prompts)]
    model = ["--model-path", str(make_target()), *ARGUMENTS]
    arms: list[Arm] = [(f"depth {depth}", CHAINS, {"max_depth": int(depth)}) for depth in _list(options.depths)]
    if options.deterministic:
        model.append("--enable-deterministic-inference")
    else:
        arms += [(name, (POLICIES / f"{name}.yaml").read_text(), {}) for name in _list(options.trees)]
    asked: dict[str, Any] = {"max_new_tokens": options.tokens, "temperature": options.temperature}
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        policy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "arm.yaml"
        policy.write_text(arms[-1][1])  # the one that needs most room
        plain = stack.enter_context(Server(model))
        server = stack.enter_context(Server([*model, *SPECULATE, str(policy)]))
        wanted = generate(plain, prompts, 8, "plain", **asked)
        control: list[Arm] = [] if options.no_control else [("plain again", "", {})]
        for concurrency in map(int, _list(options.concurrency)):
            for name, text, limit in [*control, *arms]:
                asks = server if text else plain
                if text:
                    server.edit_policy(policy, text)
                asks.flush()
                label = f"{name}, {concurrency} at a time"
                got = generate(asks, prompts, concurrency, label, **asked, custom_params={"dspark": limit})
                pairs = enumerate(zip(got, wanted, strict=True))
                gaps = {i: gap(plain, prompts[i], mine, its) for i, (mine, its) in pairs if mine != its}
                results.append({"arm": name, "concurrency": concurrency, "of": len(prompts), "different": gaps})
                print(f"{len(prompts) - len(gaps)} of {len(prompts)} identical", end="", flush=True)
                print("".join(f"; {i} parts where plain's two best are {g:.1e} apart" for i, g in gaps.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    tie = 0.0 if options.deterministic else TIE
    return int(any(g > tie for result in results for g in result["different"].values()))


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    raise SystemExit(main())
