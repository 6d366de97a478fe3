"""The CPU attention backend against a plain float64 loop, in every mode SGLang and our worker put it in."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dspark_sgl import cpu_attention_plan
from dspark_sgl.cpu_attention import CpuAttentionBackend

MODES = ("decode", "extend", "chain", "tree", "uniform", "block")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small operations on a shared machine: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One forward: ``rows[i]`` new rows behind ``prefix[i]`` cached tokens; ``parents`` of a tree, per request."""

    mode: str
    prefix: tuple[int, ...]
    rows: tuple[int, ...]
    heads: tuple[int, int]
    dim: int
    v_dim: int
    window: int
    cap: float
    dtype: torch.dtype
    parents: tuple[tuple[int, ...], ...]
    seed: int


def draw_case(mode: str, seed: int) -> Case:
    rng = random.Random(f"{mode}{seed}")
    batch = rng.randint(1, 6)
    longest = rng.choice((8, 60, 400))
    prefix = [rng.choice((0, rng.randint(0, longest))) for _ in range(batch)]
    most = 1 if mode == "decode" else rng.choice((9, 40, 280)) if mode == "extend" else 9
    rows = [rng.randint(1, most)] * batch if mode == "uniform" else [rng.randint(1, most) for _ in range(batch)]
    kv = rng.choice((1, 2, 3))
    dim = rng.choice((16, 64))
    parents = tuple(tuple(-1 if r == 0 else rng.randrange(r) for r in range(n)) for n in rows)
    return Case(
        mode=mode,
        prefix=tuple(prefix),
        rows=tuple(rows),
        heads=(kv * rng.choice((1, 3, 4)), kv),
        dim=dim,
        v_dim=dim if rng.random() < 0.85 else dim // 2,
        window=rng.choice((-1, -1, 0, 3, 30)),
        cap=rng.choice((0.0, 0.0, 0.0, 5.0)),
        dtype=torch.bfloat16 if rng.random() < 0.3 else torch.float32,
        parents=parents,
        seed=seed,
    )


@dataclass
class World:
    """A case set up in SGLang's own pools: prefixes written, the new rows' q, k, v still to be served."""

    case: Case
    backend: CpuAttentionBackend
    layer: RadixAttention
    forward: SimpleNamespace
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def run(self) -> torch.Tensor:
        self.backend.init_forward_metadata(self.forward)
        return self.backend.forward(self.q, self.k, self.v, self.layer, self.forward)


def ancestors(parents: tuple[int, ...]) -> list[set[int]]:
    seen: list[set[int]] = []
    for row, parent in enumerate(parents):
        seen.append({row} | (seen[parent] if parent >= 0 else set()))
    return seen


def build(case: Case, shuffled: bool = True, exact: bool = False) -> World:
    """Random content; ``shuffled`` scatters the slots of a request over the pool; ``exact``: batch-invariant."""
    gen = torch.Generator().manual_seed(case.seed)
    q_heads, kv_heads = case.heads
    total = sum(case.prefix) + sum(case.rows)
    reqs = ReqToTokenPool(len(case.rows), 1024, "cpu", False)
    pool = MHATokenToKVPool(
        total + 8, 1, case.dtype, kv_heads, case.dim, 1, "cpu", False, v_head_dim=case.v_dim, enable_alt_stream=False
    )
    pool.k_buffer[0].fill_(float("nan"))  # a slot nobody owns must never be read
    pool.v_buffer[0].fill_(float("nan"))
    slots = (torch.randperm(total, generator=gen) if shuffled else torch.arange(total)) + 1
    out_loc = []
    at = 0
    for i, (prefix, rows) in enumerate(zip(case.prefix, case.rows, strict=True)):
        mine = slots[at : at + prefix + rows]
        reqs.req_to_token[i + 1, : prefix + rows] = mine.int()
        pool.k_buffer[0][mine[:prefix]] = torch.randn(prefix, kv_heads, case.dim, generator=gen).to(case.dtype)
        pool.v_buffer[0][mine[:prefix]] = torch.randn(prefix, kv_heads, case.v_dim, generator=gen).to(case.dtype)
        out_loc.append(mine[prefix:])
        at += prefix + rows
    n = sum(case.rows)
    prefix, rows = torch.tensor(case.prefix), torch.tensor(case.rows)
    verify = case.mode in ("chain", "tree", "uniform", "block")
    depth = torch.cat([torch.arange(r) for r in case.rows])
    spec = None
    if verify:
        spec = SimpleNamespace(qo_lens=list(case.rows), draft_token_num=max(case.rows), tree_mask=None)
        if case.mode == "uniform":
            del spec.qo_lens, spec.tree_mask
    if case.mode == "tree":
        kin = [a for p in case.parents for a in ancestors(p)]
        spec.tree_mask = torch.tensor([[j in a for j in range(max(case.rows))] for a in kin])
        depth = torch.tensor([len(a) - 1 for a in kin])
    forward = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY
        if verify
        else ForwardMode.DECODE
        if case.mode == "decode"
        else ForwardMode.EXTEND,
        batch_size=len(case.rows),
        req_pool_indices=torch.arange(1, len(case.rows) + 1),
        seq_lens=prefix if verify else prefix + rows,
        extend_seq_lens=rows,
        out_cache_loc=torch.cat(out_loc),
        positions=torch.repeat_interleave(prefix, rows) + depth,
        spec_info=spec,
    )
    layer = RadixAttention(
        q_heads,
        case.dim,
        case.dim**-0.5,
        kv_heads,
        0,
        logit_cap=case.cap,
        v_head_dim=case.v_dim,
        attn_type=AttentionType.ENCODER_ONLY if case.mode == "block" else AttentionType.DECODER,
    )
    layer.sliding_window_size = case.window
    runner = SimpleNamespace(
        req_to_token_pool=reqs, token_to_kv_pool=pool, use_mla_backend=False, is_draft_worker=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_sgl.cpu_attention.deterministic", lambda: exact)
        backend = CpuAttentionBackend(runner)
    return World(
        case=case,
        backend=backend,
        layer=layer,
        forward=forward,
        q=torch.randn(n, q_heads * case.dim, generator=gen).to(case.dtype),
        k=torch.randn(n, kv_heads, case.dim, generator=gen).to(case.dtype),
        v=torch.randn(n, kv_heads, case.v_dim, generator=gen).to(case.dtype),
    )


def reference(world: World) -> torch.Tensor:
    """float64 [rows, q heads * v dim]: one row at a time, from the definition."""
    case, pool = world.case, world.backend.pool
    group = case.heads[0] // case.heads[1]
    q = world.q.double().view(-1, case.heads[0], case.dim)
    table = world.backend.req_to_token
    out = torch.zeros(q.shape[0], case.heads[0], case.v_dim, dtype=torch.float64)
    first = 0
    for i, (prefix, rows) in enumerate(zip(case.prefix, case.rows, strict=True)):
        mine = table[i + 1, : prefix + rows].long()
        keys = torch.cat([pool.k_buffer[0][mine[:prefix]], world.k[first : first + rows]]).double()
        values = torch.cat([pool.v_buffer[0][mine[:prefix]], world.v[first : first + rows]]).double()
        kin = ancestors(case.parents[i])
        where = [len(a) - 1 for a in kin] if case.mode == "tree" else list(range(rows))
        place = list(range(prefix)) + [prefix + d for d in where]
        for r in range(rows):
            own = {"tree": kin[r], "block": set(range(rows))}.get(case.mode, set(range(r + 1)))
            seen = [
                j
                for j in range(prefix + rows)
                if (j < prefix or j - prefix in own)
                and (case.window < 0 or place[j] >= prefix + where[r] - case.window)
            ]
            score = (keys[seen].repeat_interleave(group, 1) * q[first + r]).sum(-1) / math.sqrt(case.dim)
            if case.cap:
                score = case.cap * torch.tanh(score / case.cap)
            weight = torch.softmax(score, 0)
            out[first + r] = (weight[..., None] * values[seen].repeat_interleave(group, 1)).sum(0)
        first += rows
    return out.flatten(1)


def error(world: World) -> float:
    want = reference(world)
    got = world.run()
    assert got.dtype == world.q.dtype and got.shape == want.shape
    return float((got.double() - want).abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(36))
def test_matches_the_definition(mode: str, seed: int) -> None:
    case = draw_case(mode, seed)
    assert error(build(case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(36))
def test_an_exact_plan_matches_the_definition(mode: str, seed: int) -> None:
    case = draw_case(mode, seed)
    assert error(build(case, exact=True)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("mode", MODES)
def test_slots_in_a_row_are_read_in_place(mode: str) -> None:
    case = replace(draw_case(mode, 3), prefix=(70,), rows=(1,) if mode == "decode" else (6,), dtype=torch.float32)
    case = replace(case, parents=(tuple(range(-1, case.rows[0] - 1)),))
    world = build(case, shuffled=False)
    assert error(world) < TOLERANCE[case.dtype]
    (plan,) = world.backend._plans.values()
    assert isinstance(plan.buckets[0].slots, slice)


def test_lengths_far_apart_do_not_share_padding() -> None:
    case = replace(draw_case("extend", 1), prefix=(0, 300, 0), rows=(300, 5, 3), dtype=torch.float32, window=-1)
    case = replace(case, parents=tuple(tuple(range(-1, n - 1)) for n in case.rows), cap=0.0)
    case = replace(case, heads=(4, 2), dim=64, v_dim=64)
    world = build(case)
    assert error(world) < TOLERANCE[case.dtype]
    (plan,) = world.backend._plans.values()
    padded = sum(b.batch * b.rows * b.keys for b in plan.buckets)
    assert padded < 1.2 * (300 * 300 + 5 * 305 + 9)


@pytest.mark.parametrize("seed", range(6))
def test_a_row_alone_equals_the_row_in_a_block(seed: int) -> None:
    """Greedy speculation reproduces plain decoding only if verifying a chain computes what decoding would have."""
    base = draw_case("chain", seed)
    case = replace(base, prefix=(500, 33), rows=(8, 5), dtype=torch.float32)
    world = build(replace(case, parents=((-1,) * 8, (-1,) * 5)))
    assert max(float((alone - beside).abs().max()) for alone, beside in rows_alone(world)) < 1e-6


def test_a_row_of_an_exact_plan_is_the_same_to_the_bit_in_any_company() -> None:
    """Of chains, prefill chunks and cached prefixes, whatever is beside it; a plan that is not exact differs."""
    cases = [draw_case(mode, seed) for mode in ("chain", "extend", "uniform") for seed in range(20)]

    def differing(exact: bool) -> int:
        worlds = [build(case, exact=exact) for case in cases]
        return sum(not torch.equal(alone, beside) for world in worlds for alone, beside in rows_alone(world, step=7))

    assert differing(exact=True) == 0
    assert differing(exact=False) > 20


def rows_alone(world: World, step: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every so many rows of a forward, each decoded alone, and as it was in the forward."""
    together, table, at = world.run(), world.backend.req_to_token, 0
    for request, (prefix, rows) in enumerate(zip(world.case.prefix, world.case.rows, strict=True), 1):
        for r in range(0, rows, step):
            forward = SimpleNamespace(
                forward_mode=ForwardMode.DECODE,
                batch_size=1,
                req_pool_indices=torch.tensor([request]),
                seq_lens=torch.tensor([prefix + r + 1]),
                out_cache_loc=table[request, prefix + r : prefix + r + 1].long(),
            )
            world.backend.init_forward_metadata(forward)
            row = slice(at + r, at + r + 1)
            yield world.backend.forward(world.q[row], world.k[row], world.v[row], world.layer, forward), together[row]
        at += rows


def test_the_same_forward_twice_is_the_same_to_the_bit() -> None:
    world = build(replace(draw_case("tree", 5), dtype=torch.bfloat16))
    assert torch.equal(world.run(), world.run())


def test_an_idle_forward_answers_with_no_rows() -> None:
    world = build(draw_case("decode", 0))
    world.forward.forward_mode = ForwardMode.IDLE
    world.q = world.q[:0]
    assert world.run().shape == (0, world.case.heads[0] * world.case.v_dim)


@pytest.mark.parametrize("mode", ["tree", "chain", "block", "extend"])
def test_a_wrong_mask_is_caught(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has the power to see one key too many."""
    right = cpu_attention_plan.visible

    def one_too_many(*args: object) -> torch.Tensor:
        see = right(*args).clone()
        row = see[-1, -1].int()
        row[int((row == 0).nonzero()[0])] = 1
        see[-1, -1] = row.bool()
        return see

    case = replace(draw_case(mode, 7), prefix=(9, 0), rows=(4, 5), window=2, cap=0.0, dtype=torch.float32)
    case = replace(case, parents=((-1, 0, 0, 1), (-1, 0, 0, 1, 1)), dim=16, v_dim=16)
    assert error(build(case)) < TOLERANCE[case.dtype]
    monkeypatch.setattr(cpu_attention_plan, "visible", one_too_many)
    assert error(build(case)) > 10 * TOLERANCE[case.dtype]
