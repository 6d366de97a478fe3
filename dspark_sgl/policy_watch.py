"""Follows the policy's file: a saved change is read and validated here, in a thread of its own, and handed over whole.

A policy that is not sound changes nothing: one log line with line and column, one count. Never decides when to swap:
the governor takes what is ready between two steps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.language import Policy
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.policies.shipped import policy_source

from .metrics import Metrics

logger = logging.getLogger(__name__)

INTERVAL_S = 0.2


@dataclass(frozen=True)
class Reloads:
    """Saved versions of the policy since the server started."""

    accepted: int = 0
    refused: int = 0


class PolicyWatch:
    """Reads the policy `name` (a shipped one or a file) now, and again whenever its content changes.

    Raises PolicyError when it is not sound at the start.
    """

    def __init__(self, name: str, metrics: Metrics | None = None) -> None:
        self._name, self._metrics = name, metrics
        file, self._content = policy_source(name)
        self.first = parse_policy(self._content, file)
        self.reloads = Reloads()
        self._seen = self._content
        self._ready: deque[Policy] = deque(maxlen=1)  # the newest; a deque, so that neither thread waits for the other
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dspark-policy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def take(self) -> Policy | None:
        """A policy saved since the last call, or None. Called between two steps; costs a look at a field."""
        return self._ready.pop() if self._ready else None

    def _follow(self) -> None:
        # Content, not timestamps: editors replace files, clocks jump, and a policy is a few hundred bytes.
        while not self._stop.wait(INTERVAL_S):
            self.look()

    def look(self) -> None:
        """Read the file once; a change that two looks agree on is parsed, then offered or refused."""
        try:
            file, content = policy_source(self._name)
        except (PolicyError, OSError):
            return  # many editors replace a file by way of deleting it; a deleted policy stays in force
        settled, self._seen = content == self._seen, content
        if not settled or content == self._content:
            return  # unchanged, or still being written
        self._content = content
        try:
            policy = parse_policy(content, file)
        except PolicyError as error:
            self.reloads = Reloads(self.reloads.accepted, self.reloads.refused + 1)
            self._count("refused")
            logger.error("dspark: the saved policy is refused and the old one stays: %s", error)
        else:
            self._ready.append(policy)
            self.reloads = Reloads(self.reloads.accepted + 1, self.reloads.refused)
            self._count("accepted")
            logger.info("dspark: policy %s reloaded from %s", policy.name, file)

    def _count(self, result: str) -> None:
        # From here and not from a step: an idle server must show it too.
        if self._metrics is not None:
            self._metrics.add("policy_reloads", 1, result)
