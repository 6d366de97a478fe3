"""One SGLang request as drafters and policies see it. Reads SGLang's request object, never changes it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from dspark_sgl.policies.language import DEFAULT_TIER
from dspark_sgl.policies.requests import RequestOptions, parse_request_options
from dspark_sgl.policies.signals import RequestSignals
from dspark_sgl.spec_algos.protocol import History

from .constraints import needs_one_row

logger = logging.getLogger(__name__)


class RequestHistory(History):
    """The tokens of one SGLang request; the scheduler has appended the anchor by the time a round starts."""

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def key(self) -> Any:
        return self._request

    def __len__(self) -> int:
        return len(self._request.origin_input_ids) + len(self._request.output_ids)

    def tail(self, count: int) -> list[int]:
        if count <= 0:
            return []
        output = self._request.output_ids[-count:]
        missing = count - len(output)
        prompt = self._request.origin_input_ids[-missing:] if missing > 0 else []
        return [*prompt, *output]


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """What a policy is told of a request. max_depth: its own wish, None for none; 0 where it cannot be speculated

    rid: SGLang's name of the request, for records; no policy reads it
    """

    signals: RequestSignals
    max_depth: int | None
    rid: str


@dataclass(slots=True)
class _Record:
    """One request: its parameters, which stay, and its verify rounds so far, which plain steps are not part of."""

    tier: str
    max_depth: int | None
    temperature: float
    rounds: int = 0
    emitted: int = 0

    @classmethod
    def of(cls, request: Any) -> _Record:
        params = request.sampling_params
        try:
            options = parse_request_options(params.custom_params)
        except ValueError as error:
            # Refused with a 400 where requests come in by HTTP or Python; there are other ways in.
            logger.warning("request %s: %s; ignored", request.rid, error)
            options = RequestOptions()
        max_depth = 0 if needs_one_row(request) else options.max_depth
        # SGLang spells temperature 0 as top_k = 1.
        temperature = 0.0 if params.top_k == 1 else float(params.temperature)
        return cls(options.tier or DEFAULT_TIER, max_depth, temperature)


class RequestBook:
    """Reads each request's parameters once, and keeps count of its verify rounds."""

    def __init__(self) -> None:
        self._records: WeakKeyDictionary[Any, _Record] = WeakKeyDictionary()

    def load(self, request: Any, context_len: int, plain: bool) -> RequestLoad:
        """context_len: tokens in the request's KV; plain: this step cannot speculate, whatever the request says"""
        record = self._record(request)
        signals = RequestSignals(
            tier=record.tier,
            context_len=context_len,
            output_len=len(request.output_ids),
            accept_length=record.emitted / record.rounds if record.rounds else math.nan,
            temperature=record.temperature,
        )
        return RequestLoad(signals, 0 if plain else record.max_depth, str(request.rid))

    def count(self, request: Any, emitted: int) -> None:
        """A verify round of this request, with drafts, that emitted so many tokens."""
        record = self._record(request)
        record.rounds += 1
        record.emitted += emitted

    def _record(self, request: Any) -> _Record:
        record = self._records.get(request)
        if record is None:
            record = self._records[request] = _Record.of(request)
        return record
