"""Rehearses the GPU server where there is no GPU: plain SGLang and ours, one after the other, must answer alike.

    python -m bench.gpu.rehearsal [--policy fixed-5 --policy bench/policies/tree-16.yaml ...] [--users 3] [--tokens 32]
                                  [--temperature 1] [--algorithm EAGLE3_SGL]

Both run with the arguments that they have on a GPU, under the stand-in of `sitecustomize.py`, in float32 and small
enough for two cores: the same graphs, masks and plans, computed for real. Greedy answers of several users at once are
compared token by token; sampled ones, whose draws differ, need only come. It measures no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.server import Server
from dspark_sgl.target import chat, make_target

from ...common import ask_all
from ..servers import COMMON
from ..serving import ROOT, TREE

HERE = Path(__file__).parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")))),
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
    "SGLANG_FLASHINFER_USE_PAGED": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = (
    *("--dtype", "float32", "--max-total-tokens", "4000", "--skip-server-warmup"),
    *("--sampling-backend", "pytorch"),  # FlashInfer's samplers have no stand-in
)
POLICIES = ("off", "fixed-5", TREE, "adaptive")
REPLAY = re.compile(r"rehearsal: replayed (.*)")

Answers = list[tuple[int, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", action="append", help=f"may be repeated (default: {', '.join(POLICIES)})")
    parser.add_argument("--users", type=int, default=3, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--algorithm", default="DSPARK_SGL", help="its draft must be shipped or cached")
    options = parser.parse_args()
    unwind_when_told_to_end()
    lines = (ROOT / "bench/prompts/eval.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in lines[: 2 * options.users]]
    asking = (asked, options.users, options.tokens, options.temperature)
    plain = answers("plain", (), *asking)
    same = True
    for policy in options.policy or POLICIES:
        # A server runs in another folder.
        named = str(Path(policy).resolve()) if Path(policy).exists() else policy
        speculating = ("--speculative-algorithm", options.algorithm, "--dspark-policy", named)
        ours = answers(policy, speculating, *asking)
        equal = sum(mine == theirs for mine, theirs in zip(ours, plain, strict=True))
        print(f"{policy}: {equal} of {len(plain)} answers as plain's", flush=True)
        same = same and (equal == len(plain) or options.temperature > 0)
    return 0 if same else 1


def answers(name: str, given: Sequence[str], asked: list[str], users: int, tokens: int, temperature: float) -> Answers:
    """Of a server that is started for them, `users` at once; what it replayed is printed."""
    # Three users are four to a graph: a request that is not there is rehearsed as well.
    most = str(1 << (users - 1).bit_length())
    sizes = ("--cuda-graph-max-bs-decode", most, "--max-running-requests", most)
    arguments = ["--model-path", str(make_target()), *COMMON, *SMALL, *sizes, *given]
    with Server(arguments, ENVIRONMENT) as server:
        print(f"{name}: {server.log_file}", flush=True)
        sampling = {"max_new_tokens": tokens, "temperature": temperature, "ignore_eos": True}
        said = ask_all(lambda question: server.generate(chat(question), **sampling), asked, users)
        log = server.log
    for replayed, times in sorted(Counter(REPLAY.findall(log)).items()):
        print(f"  {replayed}: {times} times")
    lengths = [answer.accepted_length for answer in said if answer.accepted_length]
    if lengths:
        print(f"  accepted length {sum(lengths) / len(lengths):.2f}")
    return [answer.tokens for answer in said]


if __name__ == "__main__":
    sys.exit(main())
