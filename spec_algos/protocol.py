"""What a drafter is: one class that watches what the target commits and proposes what may come next.

A drafter never verifies, never accepts and never touches the target's KV. Registering it (`registry`) makes it an
SGLang speculative algorithm; the worker, the policy and the exactness come with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor

if TYPE_CHECKING:
    from dspark_sgl.kernels.draft_chain import DraftChain
    from dspark_sgl.kernels.rejection import DraftDistribution
    from dspark_sgl.kernels.tree_children import NodeDistributions
    from dspark_sgl.kernels.tree_draft import TreeShape


DEAD_SLOT = 0
"""The KV slot that SGLang never gives to a token: what is written there is nobody's."""


class History(ABC):
    """The tokens of one request, read only when a drafter asks."""

    @property
    @abstractmethod
    def key(self) -> Any:
        """The same object in every round of this request and in no other's, hashable; it dies with the request."""

    @abstractmethod
    def __len__(self) -> int:
        """Tokens of prompt and output, the anchor included. Prompt and output only ever grow at the end."""

    @abstractmethod
    def tail(self, count: int) -> list[int]:
        """The last `count` tokens of prompt and output, the anchor last."""


@dataclass(frozen=True)
class Round:
    """The batch as a drafter sees it at the start of a decode round.

    anchors: int64 `[bs]`, the last token of each request, not yet in the target's KV
    lens: int64 `[bs]`, tokens in the target's KV = the anchor's position; lens_cpu: the same on the host
    req_slots: int64 `[bs]`, rows of SGLang's request-to-token table
    cache_locs: int64 `[bs, S]`, KV slots of positions `lens .. lens + S - 1`, `S` = the server's draft tokens > block
    depths: how deep each request may be drafted (host); 0 = not at all
    tree: the size of the trees to draft, for a drafter that says `trees`; None for chains
    temperature: float32 `[bs]`; None when drafts are chosen, not drawn: every request is greedy, or acceptance is by
        match. greedy: bool `[bs]`
    generator: the round's only source of randomness, the same on every tensor-parallel rank
    """

    anchors: Tensor
    lens: Tensor
    lens_cpu: Tensor
    req_slots: Tensor
    cache_locs: Tensor
    histories: Sequence[History]
    depths: Sequence[int]
    temperature: Tensor | None
    greedy: Tensor
    generator: Generator
    tree: TreeShape | None = None


@dataclass(frozen=True)
class Proposal:
    """Draft tokens, a tree per request.

    tokens: int64 `[bs, N]`, a parent before its children
    parents: int64 `[bs, N]`: 0 = the anchor, `m + 1` = node `m`, -1 = no node; None = chains
    distribution, token_probs: what the tokens of a chain were drawn from and its value at each; drawn: the same of a
        tree. None when they were chosen deterministically: then acceptance is by match, which is exact for any choice
    confidence: float32 `[bs, N]`, chance that a node survives given that its parent did, or None. 0 where there is no
        draft: such a node and what follows it is never verified. It may read a node's ancestors, and the node itself
        only where tokens are chosen deterministically: a drawn token that decides about its own verification biases
        what is emitted
    """

    tokens: Tensor
    parents: Tensor | None = None
    distribution: DraftDistribution | None = None
    token_probs: Tensor | None = None
    confidence: Tensor | None = None
    drawn: NodeDistributions | None = None

    @classmethod
    def of_chain(cls, chain: DraftChain, confidence: Tensor | None) -> Proposal:
        return cls(chain.tokens, None, chain.distribution, chain.token_probs, confidence)

    @property
    def unsound(self) -> Tensor | None:
        """bool `[bs, N]`: drafts of a chain that were drawn from NaN. Rejection could not make up for what they are."""
        return None if self.token_probs is None else ~self.token_probs.isfinite()

    def first(self, requests: int) -> Proposal:
        """The proposal for the first so many requests."""
        chain, tree = self.distribution, self.drawn
        return Proposal(
            self.tokens[:requests],
            None if self.parents is None else self.parents[:requests],
            None if chain is None else replace(chain, probs=chain.probs[:requests]),
            None if self.token_probs is None else self.token_probs[:requests],
            None if self.confidence is None else self.confidence[:requests],
            None if tree is None else replace(tree, probs=tree.probs[:requests], place=tree.place[:requests]),
        )


@dataclass(frozen=True)
class Commit:
    """Tokens that entered the target's KV, by prefill or by acceptance, packed over the batch: a request's rows follow
    one another, at consecutive positions.

    positions, cache_locs: int64 `[n]`
    successors: int64 `[n]`, the token at the position after: a prompt token, an accepted draft or the new anchor
    hidden: `[n, K * H]`, what the drafter asked for of the target's hidden states, or None
    req_slots: int64 `[bs]`, rows of SGLang's request-to-token table
    starts: the first position of each request here; counts: its rows, at least 1 (both on the host)
    A drafter that says `on_device` is also handed rows that were not accepted, last in their request and with
    `DEAD_SLOT` for a slot: so it need not wait for a GPU to tell the host which were.
    """

    positions: Tensor
    cache_locs: Tensor
    successors: Tensor
    hidden: Tensor | None
    req_slots: Tensor
    starts: Sequence[int]
    counts: Sequence[int]


class Drafter(ABC):
    """One drafting algorithm. A subclass is registered under `algorithm`, the name given to SGLang."""

    algorithm: ClassVar[str]
    default_depth: ClassVar[int] = 7
    """How deep to draft where neither the server's settings nor the checkpoint say."""
    trees: ClassVar[bool] = False
    """It drafts trees where `Round.tree` asks for them. A drafter of nothing but trees says no, and `max_nodes`."""
    uses_target_hidden: ClassVar[bool] = False
    """`Commit.hidden` carries hidden states of the target: of the layers that the draft checkpoint names."""
    final_hidden: ClassVar[bool] = False
    """They are the final ones instead, normed, as the target's own head reads them."""
    on_device: ClassVar[bool] = False
    """It drafts and observes by tensors alone: it reads no history, and `observe` handles every row independently, so
    rejected rows may be included, aimed at `DEAD_SLOT`. On a GPU rounds then follow one another while the host still
    reads what they brought."""
    whole_chains: ClassVar[bool] = False
    """Its chains are always as deep as was asked for. What a policy then verifies all of needs no second look."""
    recurrent: ClassVar[bool] = False
    """Its context at position i also depends on the token at i + 1. SGLang's radix cache then matches pairs of tokens,
    so that what a hit brings along was written for the same successor."""

    def __init__(self, context: DrafterContext) -> None:
        self.context = context

    @property
    @abstractmethod
    def block(self) -> int:
        """The deepest path this drafter proposes, in tokens."""

    @property
    def max_nodes(self) -> int:
        """The most nodes it proposes for one request where `Round.tree` is None; `block` for a chain."""
        return self.block

    @property
    def draft_worker(self) -> Any | None:
        """The SGLang `TpModelWorker` of the draft model, for a drafter that has one."""
        return None

    @property
    def block_rows(self) -> int:
        """Rows per request of the one forward that a proposal takes, which a CUDA graph can hold; 0: there is none."""
        return 0

    def ready(self) -> None:
        """Called once, when the KV pools and attention backends exist."""

    def target_changed(self) -> None:
        """Called when the target's weights may be others: what was copied from them is copied again."""

    @abstractmethod
    def propose(self, round: Round) -> Proposal:
        """Draft for every request. Requests of depth 0 may be given anything: they are not looked at."""

    def observe(self, commit: Commit) -> None:
        """Learn what was committed. Called after every prefill chunk, plain step and verify round, in order."""


@dataclass(frozen=True)
class DrafterContext:
    """What a drafter is built from: SGLang's own objects, named once.

    block: the deepest path allowed by the server's settings
    """

    server_args: Any
    target_worker: Any
    gpu_id: int
    nccl_port: int
    block: int
