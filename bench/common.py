"""What several benches share: how a server of ours is started, asked and read. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

SPECULATE = ("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy")
"""Server arguments; a policy follows."""
PHASES = ("plan", "draft", "select", "verify", "accept", "commit")
"""Of a round, as a server's report and metrics name them."""
POLICIES = Path(__file__).parent / "policies"

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


def ask_all(
    ask: Callable[[Asked], Answered], asked: Sequence[Asked], users: int, label: str | None = None
) -> list[Answered]:
    """`ask` of each, so many at once; the answers in order. label: of a progress bar, where one is wanted"""
    with ThreadPoolExecutor(users) as pool:
        answers = pool.map(ask, asked)
        if label is None:
            return list(answers)
        from tqdm import tqdm  # a bare GPU machine may lack it

        return list(tqdm(answers, total=len(asked), desc=label))
