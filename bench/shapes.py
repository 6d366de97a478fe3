"""Single stream: chains, trees and `shape: auto`, in alternation on one server whose policy file is rewritten.

    python -m bench.shapes [--nodes 16] [--algorithm DSPARK_SGL] [--draft D] [--passes 5] [--prompts 6] [--tokens 64]

All three verify what pays (`throughput`), so that they differ in what is drafted. Prints tokens/s, and the ratio to the
better of chain and tree, pass by pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from dspark_sgl.ending import unwind_when_told_to_end
from dspark_sgl.launch import from_anywhere
from dspark_sgl.server import Server
from dspark_sgl.target import make_target

from .prompts import eval_prompts
from .speed import one_pass, spread

SHAPES = ("chain", "tree", "auto")


def policy_text(shape: str, nodes: int) -> str:
    size = "" if shape == "chain" else f", max_nodes: {nodes}"
    return f"version: 1\nname: {shape}\nschedule: {{kind: throughput}}\nshape: {{kind: {shape}{size}}}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algorithm", default="DSPARK_SGL", help="default: %(default)s")
    parser.add_argument("--draft", metavar="D", help="default: the one shipped or cached for the target")
    parser.add_argument("--nodes", type=int, default=16, help="of the largest tree (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=5, help="of every shape (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=6, help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there")
    options = parser.parse_args()
    unwind_when_told_to_end()
    prompts = [prompt.text for prompt in eval_prompts(options.prompts)]
    arguments = ["--model-path", str(make_target()), "--speculative-algorithm", options.algorithm]
    arguments += ["--speculative-draft-model-path", from_anywhere(options.draft)] if options.draft else []
    speeds: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shape.yaml"
        file.write_text(policy_text("tree", options.nodes))  # the server keeps KV for the tree of its first policy
        server = stack.enter_context(Server([*arguments, "--dspark-policy", str(file)]))
        for turn in range(-1, options.passes):  # the first turn warms up
            for shape in SHAPES if turn % 2 else reversed(SHAPES):
                server.edit_policy(file, policy_text(shape, options.nodes))
                speed = one_pass(server, prompts, options.tokens).speed
                if turn >= 0:
                    speeds[shape].append(speed)
    for shape, measured in speeds.items():
        print(f"{shape:>7}: tokens/s {spread(measured)}")
    better = max(("chain", "tree"), key=lambda shape: statistics.median(speeds[shape]))
    ratios = [auto / other for auto, other in zip(speeds["auto"], speeds[better], strict=True)]
    print(f"   auto over {better}: {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")
    if options.json:
        options.json.write_text(json.dumps({"nodes": options.nodes, "speeds": speeds}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
