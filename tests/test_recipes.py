"""Drafts as they are trained: what a row may see, what a checkpoint keeps, what the cache of readings holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes import states
from recipes.block import DFlashDraft, DSparkDraft
from recipes.data import Record
from recipes.draft import Draft
from recipes.drafts import load_draft
from recipes.evaluate import score, walk
from recipes.llama import FrozenLlama
from recipes.recurrent import Eagle3Draft, MTPDraft
from recipes.shape import Shape
from recipes.states import LiveStates, Reading, StateCache, read
from recipes.train import sample_anchors

from . import tiny_models

LAYERS = (0, 1, 2)
KINDS = ("dspark", "dflash", "eagle3", "mtp")
STEPS = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenLlama:
    folder = tmp_path_factory.mktemp("target")
    tiny_models.write_target(folder)
    return FrozenLlama.from_pretrained(str(folder), 64, "cpu", torch.float32)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    g = torch.Generator().manual_seed(3)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, tiny_models.VOCAB, (n,), generator=g).tolist()

    return [Record(tokens(4 + i % 3), tokens(12 + i), float(i % 2)) for i in range(6)]


def make(kind: str, target: FrozenLlama, records: list[Record]) -> Draft:
    torch.manual_seed(0)
    shape, hot = Shape.of(target), torch.tensor([0, 1, 2, 3, 5, 6, 8, 9, 10])
    scale = torch.rand(len(LAYERS) * shape.hidden) + 0.5
    block = {
        "shape": shape,
        "steps": STEPS,
        "layer_ids": LAYERS,
        "hot": hot,
        "layers": 2,
        "mask": tiny_models.MASK_TOKEN,
        "scale": scale,
    }
    draft: Draft
    if kind == "mtp":
        draft = MTPDraft(shape, STEPS, hot)
    elif kind == "eagle3":
        draft = Eagle3Draft(shape, STEPS, LAYERS, hot, scale)
    else:
        draft = DFlashDraft(**block) if kind == "dflash" else DSparkDraft(rank=4, **block)
    draft.initialise(target, records)
    return draft


def logits(draft: Draft, target: FrozenLlama, reading: Reading, anchors: Tensor) -> Tensor:
    """`[n, a, steps, v]`"""
    blocks = draft(reading, anchors, target.embedding)
    flat = blocks.hidden @ target.head[draft.hot].T + blocks.latent @ draft.w2.T
    return flat.view(*anchors.shape, draft.steps, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_sees_nothing_that_comes_later(kind: str, target: FrozenLlama, records: list[Record]) -> None:
    """Row k may read the tokens up to a + k - 1; block drafts read none behind the anchor but through the head."""
    draft = make(kind, target, records)
    record, anchor = records[5], torch.tensor([[8]])
    before = logits(draft, target, read(target, [record], draft.layer_ids), anchor)[0, 0]
    whole = record.prompt_ids + record.response_ids
    for k in range(1, STEPS + 1):
        changed = list(whole)
        changed[8 + k] = (changed[8 + k] + 1) % tiny_models.VOCAB
        other = Record(changed[:4], changed[4:], 0.0)
        after = logits(draft, target, read(target, [other], draft.layer_ids), anchor)[0, 0]
        assert torch.allclose(before[:k], after[:k], atol=1e-5), "a row saw the token it predicts, or a later one"
        if k < STEPS:
            moved = not torch.allclose(before[k:], after[k:], atol=1e-5)
            assert moved == (kind != "dflash"), "only DFlash drafts each position without the one before"


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_do_not_see_each_other(kind: str, target: FrozenLlama, records: list[Record]) -> None:
    draft = make(kind, target, records)
    reading = read(target, records[3:5], draft.layer_ids)
    many = torch.tensor([[6, 7, 9], [5, 8, 9]])
    together = logits(draft, target, reading, many)
    for column in range(3):
        alone = logits(draft, target, reading, many[:, column : column + 1])
        assert torch.allclose(together[:, column], alone[:, 0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_what_was_trained(
    kind: str, target: FrozenLlama, records: list[Record], tmp_path: Path
) -> None:
    draft = make(kind, target, records).to(torch.bfloat16).float()
    draft.export(tmp_path, target.head)
    loaded = load_draft(tmp_path)
    assert loaded.kind == kind and loaded.steps == draft.steps and loaded.layer_ids == draft.layer_ids
    reading, anchors = read(target, records[2:4], draft.layer_ids), torch.tensor([[6, 7], [8, 9]])
    wanted, got = (logits(d, target, reading, anchors) for d in (draft, loaded))
    # The feature scale is folded into a bf16 weight, so only nearly the same.
    assert torch.allclose(wanted.softmax(-1), got.softmax(-1), atol=0.02)


def test_eagle_unrolls_as_a_decoder_would(target: FrozenLlama, records: list[Record]) -> None:
    """The trainer's many anchors against one row after the other with a growing cache, written out plainly."""
    draft = make("eagle3", target, records)
    assert isinstance(draft, Eagle3Draft)
    record, anchor = records[4], 9
    reading = read(target, [record], LAYERS)
    embedded = F.embedding(reading.ids[0], target.embedding)
    hidden = draft.context(reading, torch.float32)[0]
    inputs = [(hidden[i], embedded[i + 1]) for i in range(anchor)]
    heads: list[Tensor] = []
    for step in range(STEPS):
        residual, entered = draft.enter(*(torch.stack(part) for part in zip(*inputs, strict=True)))
        positions = torch.arange(len(inputs))
        attention = draft.self_attn
        cos, sin = draft.rope(positions, torch.float32)

        def rotated(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        q, k = rotated(attention.heads(attention.q_proj(entered))), rotated(attention.heads(attention.k_proj(entered)))
        v = attention.heads(attention.v_proj(entered))
        mixed = F.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
        )[0]
        x = residual + attention.o_proj(mixed.transpose(0, 1).flatten(1))
        output, fed = draft.leave(x + draft.mlp(draft.post_attention_layernorm(x)))
        heads.append(output[-1])
        inputs.append((fed[-1], embedded[anchor + step + 1]))
    trained = draft(reading, torch.tensor([[3, anchor]]), target.embedding).hidden.view(2, STEPS, -1)[1]
    assert torch.allclose(torch.stack(heads), trained, atol=1e-4)


def test_the_cache_holds_what_the_target_says(
    target: FrozenLlama, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "responses.jsonl"
    data.write_text("".join(json.dumps(r.to_json()) + "\n" for r in records))
    monkeypatch.setattr(FrozenLlama, "from_pretrained", classmethod(lambda cls, *_args: target))
    options = argparse.Namespace(
        model="", data=[str(data)], layers=list(LAYERS), out=str(tmp_path / "cache"), max_length=64, sequences=2,
        workers=2, device="cpu",
    )  # fmt: skip
    states.write(options)
    cache = StateCache(tmp_path / "cache")
    assert sorted(len(r.response_ids) for r in cache.records) == sorted(len(r.response_ids) for r in records)
    got = cache.reading([1, 4], (0, 2))
    live = LiveStates(target, [str(data)], LAYERS, max_length=64)
    assert live.records == cache.records
    wanted = live.reading([1, 4], (0, 2))
    assert got.ids.equal(wanted.ids)
    for i, length in enumerate(got.length.tolist()):
        for name in ("features", "final"):
            assert torch.allclose(
                getattr(got, name)[i, :length].float(), getattr(wanted, name)[i, :length], rtol=1e-2, atol=1e-2
            )


def test_anchors_lie_in_the_response_and_have_a_successor(target: FrozenLlama, records: list[Record]) -> None:
    reading = read(target, records, ())
    anchors, real = sample_anchors(reading, 0.7, torch.Generator().manual_seed(0))
    prompt, length = reading.prompt[:, None], reading.length[:, None]
    assert bool(((anchors >= prompt) & (anchors < length - 1))[real].all())
    assert bool((anchors.diff(dim=1) >= 0).all()) and real.sum() > 20


def test_a_draft_that_is_the_target_is_always_accepted(target: FrozenLlama, records: list[Record]) -> None:
    """The offline count at its upper end: rounds of full blocks, but for what the text's end cuts off."""
    reading = read(target, [records[5]], LAYERS)
    scores = score(make("dspark", target, records), target, reading)
    always = type(scores)(torch.ones_like(scores.match), scores.ratio, scores.overlap, None, scores.valid)
    rounds = walk(always, 0.0, seed=0)
    assert all(accepted == min(STEPS, int(scores.valid[at].sum())) for at, accepted in rounds)
    assert sum(accepted + 1 for _, accepted in rounds) >= len(records[5].response_ids) - 1
