"""The arms of a load comparison, and the servers they run on.

An arm is plain SGLang, or an algorithm under a policy. Arms of one algorithm share a server, whose policy file is
rewritten between them: so they differ in the policy alone. Never drives load.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .launch import check_choice, ended, from_anywhere
from .policies.errors import PolicyError
from .policies.reader import parse_policy
from .policies.shape import most_nodes
from .policies.shipped import policy_source
from .server import Server, ServerError

PLAIN = "plain"
MTP1 = "mtp1"
"""One draft of one extra prediction module, what the announcement compares with."""


@dataclass(frozen=True)
class Arm:
    """name: as the user wrote it; algorithm: None for plain SGLang; policy: its YAML; nodes: of its largest tree"""

    name: str
    algorithm: str | None = None
    policy: str = ""
    nodes: int = 0


def parse_arms(words: str, algorithm: str, model: str, draft: str | None) -> list[Arm]:
    """`plain`, `mtp1`, a policy's name or file (under `algorithm`), or `ALGORITHM:POLICY`; one after a comma.

    Raises PolicyError for what would otherwise be found out minutes later.
    """
    arms: list[Arm] = []
    for name in filter(None, (word.strip() for word in words.split(","))):
        if name == PLAIN:
            arms.append(Arm(PLAIN))
            continue
        chosen, policy = ("MTP_SGL", "fixed-1") if name == MTP1 else (algorithm, name)
        if found := re.fullmatch(r"([A-Za-z0-9]+_SGL):(.+)", name, re.IGNORECASE):
            chosen, policy = found[1], found[2]
        chosen = chosen.upper()
        # Of several algorithms, --draft is for the one that --algorithm names.
        check_choice(chosen, model, draft if chosen == algorithm.upper() else None)
        file, content = policy_source(policy)
        nodes = most_nodes(parse_policy(content, file))
        label = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        arms.append(Arm(label, chosen, content.decode(), nodes))
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not arms or twice:
        raise PolicyError("--arms", 0, 0, f"names {twice!r} twice" if twice else "names none")
    return arms


class Fleet:
    """`with Fleet(arms, ...) as fleet:` holds a running server per algorithm."""

    def __init__(self, arms: Sequence[Arm], algorithm: str, model: str, draft: str | None, more: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dspark-load-"))
        self._servers: dict[str | None, Server] = {}
        for chosen in dict.fromkeys(arm.algorithm for arm in arms):
            arguments = ["--model-path", from_anywhere(model), *more]
            if chosen is not None:
                first = max((arm for arm in arms if arm.algorithm == chosen), key=lambda arm: arm.nodes)
                self._policy(chosen).write_text(first.policy)  # the one that needs most room
                arguments += ["--speculative-algorithm", chosen, "--dspark-policy", str(self._policy(chosen))]
            if chosen == algorithm.upper() and draft:
                arguments += ["--speculative-draft-model-path", from_anywhere(draft)]
            self._servers[chosen] = Server(arguments)
        self._stack = ExitStack()

    def __enter__(self) -> Fleet:
        print(f"Starting SGLang {len(self._servers)} times (about a minute each) ...", file=sys.stderr, flush=True)
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        try:
            for server in self._servers.values():
                self._stack.enter_context(server)
        except ServerError:
            self._stack.close()
            raise ended(server) from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def server(self, arm: Arm) -> Server:
        """The arm's server, with its policy in force."""
        server = self._servers[arm.algorithm]
        if arm.algorithm is not None:
            server.edit_policy(self._policy(arm.algorithm), arm.policy)
        return server

    def _policy(self, algorithm: str) -> Path:
        return self._folder / f"{algorithm}.yaml"
