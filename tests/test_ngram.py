"""The look-up index against a search by brute force, and what a drafter makes of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_sgl.spec_algos import ngram
from dspark_sgl.spec_algos.ngram import LONGEST, SHORTEST, Agreement, Match, NgramDrafter, Reader, SuffixIndex
from dspark_sgl.spec_algos.protocol import DrafterContext, History, Proposal, Round

TEXTS = st.lists(st.integers(0, 2), max_size=60)


class Text(History):
    """A request that says what it is told to."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.read = 0

    @property
    def key(self) -> Any:
        return self

    def __len__(self) -> int:
        return len(self.tokens)

    def tail(self, count: int) -> list[int]:
        self.read += count
        return self.tokens[len(self.tokens) - count :]


def index_of(tokens: Sequence[int]) -> SuffixIndex:
    index = SuffixIndex()
    index.extend(tokens)
    return index


def longest_by_search(tokens: Sequence[int]) -> Match | None:
    """The definition: the longest suffix that also ends earlier, up to LONGEST, and the latest place of it."""
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        for end in range(len(tokens) - 2, length - 2, -1):
            if list(tokens[end - length + 1 : end + 1]) == list(tokens[-length:]):
                return Match(end, length)
    return None


@given(TEXTS)
def test_the_index_finds_what_a_search_finds(tokens: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "CANDIDATES", len(tokens))
        assert index_of(tokens).longest_match() == longest_by_search(tokens)


@given(TEXTS, st.lists(st.integers(1, 7), max_size=30))
def test_growing_piece_by_piece_is_the_same_as_at_once(tokens: list[int], pieces: list[int]) -> None:
    index, read = SuffixIndex(), 0
    for size in [*pieces, len(tokens)]:
        index.extend(tokens[read : read + size])
        read += size
        assert index.longest_match() == index_of(tokens[:read]).longest_match()


def test_only_the_latest_candidates_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    far = [9, 1, 2, 5]
    near = [1, 2, 7] * 3
    tokens = [*far, *near, 9, 1, 2]
    assert index_of(tokens).longest_match() == Match(2, 3)
    monkeypatch.setattr(ngram, "CANDIDATES", 3)
    assert index_of(tokens).longest_match() == Match(len(far) + 7, 2)


@given(TEXTS, st.integers(0, 4), st.integers(1, 20))
def test_a_continuation_is_what_followed_and_goes_round_at_the_end(tokens: list[int], back: int, count: int) -> None:
    end = len(tokens) - 2 - back
    if end < 0:
        return
    followed = index_of(tokens).continuation(end, count)
    assert len(followed) == count
    # Writing it down one by one, as LZ77 does, may read what was just written.
    text = list(tokens)
    for k in range(count):
        text.append(text[end + 1 + k])
    assert followed == text[len(tokens) :]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=50), max_size=12))
def test_memory_is_bounded_and_the_end_of_the_text_is_never_forgotten(pieces: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "REMEMBERED", 24)
        patch.setattr(ngram, "CANDIDATES", 1000)
        index, text = SuffixIndex(), list[int]()
        for piece in pieces:
            index.extend(piece)
            text += piece
            kept = len(index._tokens)
            assert min(len(text), 24) <= kept <= 48 and list(index._tokens) == text[-kept:]
            assert index.longest_match() == longest_by_search(text[-kept:])


def test_a_long_history_is_read_once() -> None:
    """32k tokens of prompt, then one token a round: a round reads one token."""
    text, reader = Text([i * i % 997 for i in range(32_000)]), Reader(Agreement())
    reader.catch_up(text)
    assert text.read == 32_000
    for token in range(50):
        text.tokens.append(token)
        reader.catch_up(text)
        reader.propose(7)
    assert text.read == 32_050


def test_confidence_follows_what_a_match_proves_to_be_worth() -> None:
    everyone = Agreement()
    reader, other = Reader(everyone), Reader(everyone)
    said = Text([1, 2, 3, 4, 5, 6, 7, 8] * 3)
    reader.catch_up(said)
    tokens, first = reader.propose(4)
    assert tokens == [1, 2, 3, 4] and first == sorted(first)
    for _ in range(20):  # it goes on and on
        said.tokens += tokens
        reader.catch_up(said)
        tokens, sure = reader.propose(4)
    assert sure[0] > 0.9 > first[0]
    for _ in range(60):  # a text in which what follows a pair is never what followed it before
        said.tokens += [1, 2, 100 + len(said.tokens)]
        reader.catch_up(said)
        said.tokens += [1, 2]
        reader.catch_up(said)
        _, unsure = reader.propose(4)
    assert unsure[0] < 0.15
    other.catch_up(Text([1, 2, 3, 1, 2]))
    assert other.propose(1)[1][0] < 0.25, "a new request starts from what all of them have shown"


def test_only_the_first_wrong_draft_counts() -> None:
    agreement = Agreement()
    reader, said = Reader(agreement), Text([1, 2, 3, 4, 1, 2])
    reader.catch_up(said)
    assert reader.propose(4)[0] == [3, 4, 1, 2]
    said.tokens += [3, 9, 1]
    reader.catch_up(said)
    tried = {n: count for n, count in enumerate(agreement._tried) if count}
    assert tried == {2: 1.0, 3: 1.0}
    assert agreement._agreed[2] == 1.0 and agreement._agreed[3] == 0.0


def round_of(histories: Sequence[History], depths: Sequence[int]) -> Round:
    nothing = torch.zeros(len(depths), dtype=torch.int64)
    return Round(
        anchors=nothing,
        lens=nothing,
        lens_cpu=nothing,
        req_slots=nothing,
        cache_locs=nothing[:, None],
        histories=histories,
        depths=depths,
        temperature=None,
        greedy=nothing == 0,
        generator=torch.Generator(),
    )


def propose(drafter: NgramDrafter, histories: Sequence[History], depths: Sequence[int]) -> Proposal:
    return drafter.propose(round_of(histories, depths))


@pytest.fixture
def drafter() -> NgramDrafter:
    return NgramDrafter(DrafterContext(None, None, 0, 0, block=4))


def test_where_nothing_came_before_nothing_is_proposed(drafter: NgramDrafter) -> None:
    unread = Text([1, 2, 3, 1, 2])
    proposal = propose(drafter, [Text([1, 2, 3, 4, 5]), Text([7, 8, 9, 7, 8]), unread, Text([1])], [4, 2, 0, 4])
    assert proposal.parents is None and proposal.distribution is None and proposal.confidence is not None
    assert proposal.tokens.tolist() == [[0] * 4, [9, 7, 8, 9], [0] * 4, [0] * 4]
    assert (proposal.confidence > 0).tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
    assert unread.read == 0


def test_what_is_known_of_a_request_goes_with_it(drafter: NgramDrafter) -> None:
    text = Text([1, 2, 3, 1, 2])
    propose(drafter, [text], [4])
    gone = weakref.ref(drafter._readers[text])
    assert gone() is not None
    del text
    gc.collect()
    assert gone() is None and len(drafter._readers) == 0
