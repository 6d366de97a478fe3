"""The arms of a load comparison, and the servers they run on.

An arm is plain SGLang, an algorithm of SGLang's own, or one of ours under a policy. Arms of one algorithm share a
server, whose policy file is rewritten between them: so they differ in the policy alone. Never drives load.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .drafts import CHECKPOINTS, find_draft
from .launch import check_choice, ended, from_anywhere, is_here
from .policies.errors import PolicyError
from .policies.reader import parse_policy
from .policies.shape import most_nodes
from .policies.shipped import policy_source
from .policies.suggest import did_you_mean
from .server import Server, ServerError
from .source_index import find

PLAIN = "plain"
MTP1 = "mtp1"
"""One draft of one extra prediction module, what the announcement compares with."""
SGLANG = "sglang:"


@dataclass(frozen=True)
class Arm:
    """name: as the user wrote it; algorithm: None for plain SGLang; draft: None for the one that the server finds

    policy: its YAML, empty where the algorithm is SGLang's own; nodes: of its largest tree
    """

    name: str
    algorithm: str | None = None
    draft: str | None = None
    policy: str = ""
    nodes: int = 0


def parse_arms(words: str, algorithm: str, model: str, draft: str | None) -> list[Arm]:
    """`plain`, `mtp1`, a policy's name or file (under `algorithm`), `ALGORITHM:POLICY`, or `sglang:ALGORITHM`, with
    commas between them. Of several algorithms, `draft` is for the one that `algorithm` names, and for SGLang's own of
    that name.

    Raises PolicyError for what would otherwise be found out minutes later.
    """
    kind = algorithm.upper().removesuffix("_SGL")
    arms: list[Arm] = []
    for name in filter(None, (word.strip() for word in words.split(","))):
        if name == PLAIN:
            arms.append(Arm(PLAIN))
        elif name.lower().startswith(SGLANG):
            chosen = name[len(SGLANG) :].upper()
            arms.append(_of_sglang(name, chosen, model, draft if chosen == kind else None))
        else:
            arms.append(_of_ours(name, algorithm.upper(), model, draft))
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not arms or twice:
        raise PolicyError("--arms", 0, 0, f"names {twice!r} twice" if twice else "names none")
    return arms


def _of_ours(name: str, algorithm: str, model: str, draft: str | None) -> Arm:
    chosen, policy = ("MTP_SGL", "fixed-1") if name == MTP1 else (algorithm, name)
    if found := re.fullmatch(r"([A-Za-z0-9]+_SGL):(.+)", name, re.IGNORECASE):
        chosen, policy = found[1].upper(), found[2]
    draft = draft if chosen == algorithm else None
    check_choice(chosen, model, draft)
    file, content = policy_source(policy)
    nodes = most_nodes(parse_policy(content, file))
    label = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    return Arm(label, chosen, draft, content.decode(), nodes)


def _of_sglang(name: str, algorithm: str, model: str, draft: str | None) -> Arm:
    """SGLang's own has to be told of the draft that ours finds by itself."""
    known = _algorithms_of_sglang()
    if algorithm not in known:
        meant = f"SGLang has no such algorithm; there are {', '.join(known)}" + did_you_mean(algorithm, known)
        raise PolicyError("--arms", 0, 0, f"{name!r}: {meant}")
    if draft is not None:
        is_here("--draft", draft)
    elif algorithm.lower() in CHECKPOINTS and Path(model).is_dir():
        found = find_draft(model, algorithm)
        if found is None:
            raise PolicyError(
                "--arms", 0, 0, f"{name!r}: no draft is shipped or cached for {model}; name it with --draft"
            )
        draft = str(found)
    return Arm(name, algorithm, draft)


def _algorithms_of_sglang() -> list[str]:
    """Read, not imported: that takes half a minute."""
    enum = find("sglang.srt.speculative.spec_info.SpeculativeAlgorithm")
    assigned = [s for s in enum.body if isinstance(s, ast.Assign)] if isinstance(enum, ast.ClassDef) else []
    names = {name.id for s in assigned for name in s.targets if isinstance(name, ast.Name)}
    return sorted((names - {"NONE"}) | {"NEXTN"})  # another name of EAGLE, which SGLang takes as well


def check_machine(arms: Sequence[Arm]) -> None:
    """Raises PolicyError where an arm cannot run here."""
    own = next((arm.name for arm in arms if arm.algorithm and not arm.policy), None)
    if own is None:
        return
    from .cpu_activation import has_accelerator

    if not has_accelerator():
        raise PolicyError("--arms", 0, 0, f"{own!r} needs a GPU: SGLang's own speculation does not run on a CPU")


class ArmServers:
    """`with ArmServers(arms, ...) as servers:` holds a running server per algorithm. more: further arguments of each"""

    def __init__(self, arms: Sequence[Arm], model: str, more: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dspark-load-"))
        self._servers: dict[str | None, Server] = {}
        for algorithm in dict.fromkeys(arm.algorithm for arm in arms):
            # The one that needs most room.
            first = max((arm for arm in arms if arm.algorithm == algorithm), key=lambda arm: arm.nodes)
            arguments = ["--model-path", from_anywhere(model), *more]
            if algorithm is not None:
                arguments += ["--speculative-algorithm", algorithm]
            if first.policy:
                self._policy(first).write_text(first.policy)
                arguments += ["--dspark-policy", str(self._policy(first))]
            if first.draft:
                arguments += ["--speculative-draft-model-path", from_anywhere(first.draft)]
            self._servers[algorithm] = Server(arguments)
        self._stack = ExitStack()

    def __enter__(self) -> ArmServers:
        print(f"Starting SGLang {len(self._servers)} times (about a minute each) ...", file=sys.stderr, flush=True)
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        try:
            for server in self._servers.values():
                self._stack.enter_context(server)
        except ServerError as error:
            self._stack.close()
            raise ended(server, error) from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def of(self, arm: Arm) -> Server:
        """The arm's server, with its policy in force."""
        server = self._servers[arm.algorithm]
        if arm.policy:
            server.edit_policy(self._policy(arm), arm.policy)
        return server

    def _policy(self, arm: Arm) -> Path:
        return self._folder / f"{arm.algorithm}.yaml"
