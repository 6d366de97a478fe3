"""Drafts as they are trained: what a row may see, what a checkpoint keeps, what the cache of readings holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig, PretrainedConfig, Qwen3Config

from recipes import states, vary
from recipes.block import DFlashDraft, DSparkDraft
from recipes.corpus import batches
from recipes.curves import draw
from recipes.data import Record
from recipes.decoder import sample
from recipes.draft import Draft
from recipes.drafts import ALGORITHMS, load_draft
from recipes.evaluate import score, summarise, walk
from recipes.llama import FrozenLlama, check_config
from recipes.recurrent import Eagle3Draft, MTPDraft
from recipes.shape import Shape
from recipes.states import LiveStates, Reading, StateCache, read
from recipes.train import Trainer, sample_anchors

from . import tiny_drafts, tiny_models

LAYERS = (0, 1, 2)
KINDS = tuple(ALGORITHMS)
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
        "mask": tiny_drafts.MASK_TOKEN,
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
    # Every token behind the first anchor is counted, and none behind the end.
    assert summarise([always], 0.0)["tokens"] == len(records[5].response_ids) - 1


def test_a_round_in_mid_text_counts_its_bonus(target: FrozenLlama, records: list[Record]) -> None:
    scores = score(make("dspark", target, records), target, read(target, [records[5]], LAYERS))
    never = type(scores)(torch.zeros_like(scores.match), scores.ratio, scores.overlap, None, scores.valid)
    assert summarise([never], 0.0)["accepted_length"] == 1.0


@pytest.mark.parametrize("vocabulary", [7, 256, 600])
def test_tokens_are_drawn_as_they_are_probable(vocabulary: int) -> None:
    """Whether blocks of 256 divide the vocabulary or not: chi-square over the last five tokens and all the others."""
    torch.manual_seed(0)
    n, temperature = 20_000, 0.7
    logits = torch.randn(vocabulary)
    logits[-5:] += 4
    drawn = sample(logits.expand(n, -1), torch.full((n,), temperature))
    p = (logits / temperature).softmax(0)
    expected = n * torch.cat([p[-5:], p[:-5].sum()[None]])
    counts = drawn.bincount(minlength=vocabulary)
    assert len(counts) == vocabulary, "a token that the vocabulary does not have"
    found = torch.cat([counts[-5:], counts[:-5].sum()[None]])
    assert float(((found - expected) ** 2 / expected).sum()) < 25  # 5 degrees of freedom: p < 2e-4
    assert sample(logits[None], torch.zeros(1)).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5}, "rope_type is 'llama3'"),
        ("attention_bias", True, "attention_bias is True"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("model_type", "qwen3", "model_type is 'qwen3'"),
    ],
)
def test_a_target_that_would_be_computed_wrongly_is_refused(
    target: FrozenLlama, field: str, value: object, said: str
) -> None:
    check_config(target.config)
    other = argparse.Namespace(**{**target.config.to_dict(), "name_or_path": "big", field: value})
    with pytest.raises(SystemExit, match=f"^error: big: {said}; the recipes read a Llama of .* only$"):
        check_config(other)


@pytest.mark.parametrize("other", [Qwen3Config(), MistralConfig()], ids=lambda config: config.model_type)
def test_a_target_of_another_kind_is_refused(other: PretrainedConfig) -> None:
    """Their configs lack fields that a Llama's has."""
    with pytest.raises(SystemExit, match=f"^error: the target: model_type is {other.model_type!r}; "):
        check_config(other)


def test_too_few_responses_are_one_line(records: list[Record]) -> None:
    with pytest.raises(SystemExit, match="6 responses to train on are fewer than --sequences 7"):
        next(batches(records, 7, seed=0))
    assert sorted(next(batches(records, 6, seed=0))) == list(range(6))


def test_half_a_draft_cannot_be_made(target: FrozenLlama) -> None:
    class Half(DSparkDraft):
        config = Draft.config

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_a_checkpoint_of_another_kind_is_one_line(target: FrozenLlama, records: list[Record], tmp_path: Path) -> None:
    make("mtp", target, records).export(tmp_path, target.head)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(MTPDraft.architecture, "Unheard"))
    with pytest.raises(SystemExit, match=r"config\.json: architectures: \['Unheard'\]"):
        load_draft(tmp_path)


def test_a_curve_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = {"temperature 1": [(0.5, 1.2), (2.0, 1.6)], "temperature 0": [(0.5, 1.3), (2.0, 1.9)]}
    draw(lines, "minutes of training", "accepted length", tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert all(f"<!-- {words} -->" in text for words in (*lines, "minutes of training", "accepted length"))
    draw(lines, "minutes of training", "accepted length", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_what_a_variation_does_not_concern_is_compared_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of runs that are all there nothing is trained; the gains are those of the table's own lengths."""
    variations = {"unchanged": ((), vary.COMPARED), "rank 8": (("--rank", "8"), ("dspark",))}
    monkeypatch.setattr(vary, "VARIATIONS", variations)
    lengths = {"unchanged": {"dspark": 1.5, "dflash": 1.2, "eagle3": 1.6}, "rank-8": {"dspark": 1.26}}
    for name, drafts in lengths.items():
        for algorithm, length in drafts.items():
            run = tmp_path / name / algorithm
            run.mkdir(parents=True)
            lines = ({"tokens": 50, "expected_t1": 1.0}, {"tokens": 100, "expected_t1": length})
            (run / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained: list[list[str]] = []
    monkeypatch.setattr(vary.subprocess, "run", lambda command, check: trained.append(command))
    given = ["vary", "--model", "m", "--cache", "c", "--out", str(tmp_path), "--tokens", "100"]
    monkeypatch.setattr("sys.argv", given)
    vary.main()
    assert trained == []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [
        ["unchanged", "1.500", "1.200", "1.600", "+25.0 %", "-6.2 %"],
        ["rank 8", "1.260", "1.200", "1.600", "+5.0 %", "-21.3 %"],
    ]


def test_a_run_that_goes_on_reports_as_often_as_one_that_never_stopped(
    target: FrozenLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has an hour behind it and an hour between reports has only its end to report."""
    monkeypatch.setattr("torch._dynamo.config.disable", True)  # compiling the loss takes half a minute
    g = torch.Generator().manual_seed(1)
    data = tmp_path / "responses.jsonl"
    rows = [
        Record(torch.randint(0, tiny_models.VOCAB, (8,), generator=g).tolist(), [1, 2, 3, 4, 5, 6, 7, 8], float(i % 2))
        for i in range(400)
    ]
    data.write_text("".join(json.dumps(r.to_json()) + "\n" for r in rows))
    monkeypatch.setattr(FrozenLlama, "from_pretrained", classmethod(lambda cls, *_args: target))
    options = argparse.Namespace(
        algorithm="mtp", model="", cache=None, data=[str(data)], out=str(tmp_path), tokens=64, minutes=None,
        resume=True, block=STEPS, coverage=1.0, max_length=64, sequences=2, accumulate=1, anchor_share=0.5, lr=1e-3,
        l1=0.9, ce=0.3, warmup=2, report_every=60.0, workers=1, device="cpu", seed=1,
    )  # fmt: skip
    Trainer(options).run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(state | {"seconds": 4000.0}, tmp_path / "state.pt")
    options.tokens = 128
    Trainer(options).run()
    reported = [json.loads(line)["tokens"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert reported == [64, 128]
