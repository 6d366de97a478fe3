"""Real servers on the GPU, those of a target started together and measured in turn: plain SGLang, its DSPARK, and ours.

Two targets: SmolLM2 with the draft that ships, whose answers are text, and one as large as Qwen3-8B whose drafts are
right as often as was chosen (`known.py`). Every arm answers the same prompts greedily with answers of one length, so
that tokens per second compare; a long one, since a prefill costs the host some forty milliseconds there. What is right
is plain SGLang's answer, or the known one; of a real model in bfloat16 not all are, since a tie falls one way or the
other.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dspark_sgl.target import chat

from ..common import PHASES, POLICIES, SPECULATE, ask_all
from .bundle import Bundle
from .known import QWEN3_8B, QWEN3_8B_DRAFT, DraftSize, Size, write_draft, write_target
from .servers import Answer, GpuServers, Target

ROOT = Path(__file__).parents[2]
USERS = (1, 8, 32, 64)
PASSES = 2
TREE = str(POLICIES / "tree-16.yaml")


@dataclass(frozen=True)
class Point:
    """One arm at so many users: tokens per second of each pass, mean accepted length, answers that are
    right, and host milliseconds per phase of a round of ours."""

    arm: str
    users: int
    speeds: list[float]
    length: float
    same: int
    answers: int
    phases: dict[str, float]


def smollm2(bundle: Bundle) -> Target:
    """The demo's target. SGLang's own DSPARK has to be told of the draft; ours finds it by itself."""
    small = ("--max-total-tokens", "50000")
    lines = (ROOT / "bench/prompts/eval.jsonl").read_text().splitlines()
    asked = [chat(json.loads(line)["prompt"]) for line in lines]
    arms = {
        "plain": (),
        "SGLang's DSPARK": ("--speculative-algorithm", "DSPARK", "--speculative-draft-model-path", str(bundle.draft)),
        "ours, off": (*SPECULATE, "off"),
        "ours, fixed-5": (*SPECULATE, "fixed-5"),
        "ours, tree-16": (*SPECULATE, TREE),
        "ours, adaptive": (*SPECULATE, "adaptive"),
    }
    prompts = [{"text": text} for text in asked]
    ready = {arm: (*small, *more) for arm, more in arms.items()}
    return Target("SmolLM2-135M, its own draft", bundle.target, ready, prompts, tokens=192)


def known(folder: Path, size: Size = QWEN3_8B, draft: DraftSize = QWEN3_8B_DRAFT) -> Target:
    """A target whose drafts are right as often as `draft` says, written into `folder`."""
    successor = write_target(folder / "target", size).tolist()
    write_draft(folder / "draft", size, draft)
    tokens = 384
    common = ("--max-total-tokens", "32000", "--skip-tokenizer-init")
    with_draft = ("--speculative-draft-model-path", str(folder / "draft"))
    arms = {
        "plain": (),
        "SGLang's DSPARK": ("--speculative-algorithm", "DSPARK", *with_draft),
        "ours, fixed-7": (*SPECULATE, "fixed-7", *with_draft),
        "ours, adaptive": (*SPECULATE, "adaptive", *with_draft),
    }
    g = random.Random(0)
    prompts = [{"input_ids": [g.randrange(2, size.vocab_size) for _ in range(64)]} for _ in range(240)]
    wanted = []
    for prompt in prompts:
        text = [prompt["input_ids"][-1]]
        for _ in range(tokens):
            text.append(successor[text[-1]])
        wanted.append(text[1:])
    title = (
        f"Qwen3-8B in size ({size.num_hidden_layers} layers of {size.hidden_size}), drafts right with "
        f"{draft.right:.2f} each, a second choice with {draft.second:.2f}; a whole chain accepts {draft.length:.2f}"
    )
    ready = {arm: (*common, *more) for arm, more in arms.items()}
    return Target(title, folder / "target", ready, prompts, tokens, wanted)


def measure_serving(servers: GpuServers, seconds: float) -> list[Point]:
    """Every arm at every number of users, in turn; `PASSES` passes, or as many as begin within that long."""
    target = servers.target
    _warm_up(servers)
    passes: dict[tuple[str, int], list[Pass]] = {}
    until = time.monotonic() + seconds
    for number in range(PASSES):
        for count in USERS:
            for arm in servers.ready:
                if number == 0 or time.monotonic() < until:
                    passes.setdefault((arm, count), []).append(_run(servers, arm, count))
    points = []
    for (arm, count), done in passes.items():
        answers, plain = done[-1].answers, passes.get(("plain", count))
        wanted = [] if plain is None else [answer.said for answer in plain[-1].answers]
        if target.wanted is not None:
            wanted = [target.wanted[i] for i in _chosen(len(target.prompts), count)]
        same = sum(answer.said == right for answer, right in zip(answers, wanted, strict=False))
        length = statistics.mean(answer.tokens / answer.rounds for answer in answers)
        points.append(Point(arm, count, [one.speed for one in done], length, same, len(answers), done[-1].phases))
    return points


@dataclass(frozen=True)
class Pass:
    """speed: tokens per second; phases: host milliseconds of a decode step"""

    speed: float
    answers: list[Answer]
    phases: dict[str, float]


def _run(servers: GpuServers, arm: str, users: int) -> Pass:
    """All prompts of so many users, that many at a time."""
    target = servers.target
    asked = [target.prompts[i] for i in _chosen(len(target.prompts), users)]
    before, start = servers.clock(arm), time.perf_counter()
    answers = ask_all(lambda prompt: servers.ask(arm, prompt, target.tokens), asked, users)
    speed = sum(answer.tokens for answer in answers) / (time.perf_counter() - start)
    print(f"{arm}, {users} users: {speed:.0f} tokens/s", flush=True)
    return Pass(speed, answers, _per_round(before, servers.clock(arm)))


def _chosen(prompts: int, users: int) -> range:
    """A prompt a user, at least four, from all over."""
    asked = max(users, 4)
    return range(0, prompts // asked * asked, prompts // asked)


def _warm_up(servers: GpuServers) -> None:
    """What is compiled at first use, at every size of batch. An arm that fails here is not measured."""
    for arm in list(servers.ready):
        try:
            for count in USERS:
                ask_all(partial(servers.ask, arm, tokens=24), servers.target.prompts[:count], count)
        except OSError:
            servers.ready.remove(arm)


def _per_round(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Host milliseconds of each phase, and of the engine around them, over the decode steps between two readings."""
    if not after:
        return {}
    steps = sum(after["counts"].get(kind, 0) - before["counts"].get(kind, 0) for kind in ("round", "plain"))
    names = (*PHASES, "plain", "engine")
    spent = {name: after["seconds"].get(name, 0.0) - before["seconds"].get(name, 0.0) for name in names}
    return {name: 1000 * seconds / max(1, steps) for name, seconds in spent.items()}


def serving_table(title: str, points: list[Point]) -> list[str]:
    """Markdown: tokens per second, the ratio to plain SGLang at the same users, accepted length, right answers."""
    plain = {point.users: statistics.median(point.speeds) for point in points if point.arm == "plain"}
    lines = [
        f"{title}:",
        "",
        "| arm | users | tokens/s | of plain | accepted length | answers right |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        speed = statistics.median(point.speeds)
        spread = f"{min(point.speeds):.0f} to {max(point.speeds):.0f}" if len(point.speeds) > 1 else f"{speed:.0f}"
        ratio = f"{speed / plain[point.users]:.2f}" if point.users in plain else ""
        length = "" if point.arm == "plain" else f"{point.length:.2f}"
        lines.append(
            f"| {point.arm} | {point.users} | {spread} | {ratio} | {length} | {point.same} of {point.answers} |"
        )
    return lines


def phase_table(points: list[Point]) -> list[str]:
    """Markdown: where the host is while a round of ours goes on, in milliseconds per decode step."""
    with_phases = [point for point in points if point.phases]
    if not with_phases:
        return []
    names = list(with_phases[0].phases)
    lines = [
        "Host milliseconds per decode step (a phase that waits for the GPU has the GPU's time):",
        "",
        "| arm | users | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for point in with_phases:
        spent = " | ".join(f"{point.phases[name]:.2f}" for name in names)
        lines.append(f"| {point.arm} | {point.users} | {spent} |")
    return lines
