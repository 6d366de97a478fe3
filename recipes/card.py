"""Put a trained draft where it ships: checkpoint files, a model card with the measured figures, a curve as SVG.

Every number in the card comes from the files given; nothing is measured, trained or fetched here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

CARD = """# DSpark draft for {name}

A {layers}-layer DSpark draft ({size:.1f} MB, bf16) for speculative decoding of {name}: block of {block}, vanilla
Markov head of rank {rank}, confidence head. It loads in SGLang as `Qwen3DSparkModel`; embedding and `lm_head` are the
target's.

| file | |
|---|---|
| `config.json`, `model.safetensors` | the released DSpark format |
| `hot_vocab.json` | the {hot} sorted token ids the draft was trained to propose; all others carry a bias of -30 |

## Accepted length

Chain, bonus token included, on {prompts} prompts never trained on (up to 128 new tokens each, bf16 target; the exact
offline count of `recipes/evaluate.py`).

{figures}

Chance that draft k is accepted, given that 1..k-1 were:

{positions}

Confidence head, mean over all anchors at temperature 1, against the true mean 1 - TV (before any temperature scaling):

{confidence}

## Training

{recipe}

![accepted length over training](curve.svg)

{curve}

Measured on a small held-out sample of the training distribution; `overlap` is 1 - TV at temperature 1 of the first and
the last draft of a block.

## What would still help

More training time first: the curve flattens because the learning rate ran out, not because the draft stopped learning.
After that more prompts of more kinds, and longer responses. Calibrating the confidence head (sequential temperature
scaling) belongs to the runtime.

## Licence

Apache-2.0, as the target.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def figures(result: dict) -> tuple[str, str, str]:
    """Markdown tables of an evaluation: accepted lengths, acceptance by position, confidence against overlap."""
    domains = list(result["temperature_0"]["domains"])
    lengths, positions = [], []
    for key, label in (("temperature_0", "0"), ("temperature_1", "1")):
        parts = {"overall": result[key]["overall"]} | result[key]["domains"]
        lengths.append([label, *(f"{parts[d]['accepted_length']:.2f}" for d in ["overall", *domains])])
        for name, part in parts.items():
            positions.append([label, name, *(f"{x:.2f}" for x in part["acceptance_by_position"])])
    gamma = len(positions[0]) - 2
    numbers = [str(k) for k in range(1, gamma + 1)]
    overall = result["temperature_1"]["overall"]
    confidence = [
        [label, *(f"{x:.3f}" for x in overall[key])]
        for label, key in (("predicted", "confidence_by_position"), ("true", "overlap_by_position"))
    ]
    return (
        table(["temperature", "overall", *domains], lengths),
        table(["temperature", "domain", *numbers], positions),
        table(["", *numbers], confidence),
    )


def curve_table(curve: list[dict]) -> str:
    rows = [
        [
            f"{c['seconds'] / 60:.0f}",
            str(c["step"]),
            f"{c['positions'] / 1e6:.2f} M",
            f"{c['overlap'][0]:.2f}, {c['overlap'][-1]:.2f}",
            f"{c['expected_t1']:.2f}",
            f"{c['length_t0']:.2f}",
        ]
        for c in curve
    ]
    return table(["minutes", "steps", "block positions", "overlap", "expected length T=1", "length T=0"], rows)


def curve_svg(curve: list[dict], width: int = 560, height: int = 260) -> str:
    """Accepted length over training minutes as a plain SVG line chart."""
    left, bottom, top, right = 44, 36, 14, 110
    minutes = [c["seconds"] / 60 for c in curve]
    series = (("expected_t1", "temperature 1", "#2563eb"), ("length_t0", "temperature 0", "#d97706"))
    low, high = 1.0, max(c[key] for c in curve for key, _, _ in series) * 1.05

    def x(m: float) -> float:
        return left + m / max(minutes) * (width - left - right)

    def y(v: float) -> float:
        return height - bottom - (v - low) / (high - low) * (height - bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    ticks = [low + i * 0.2 for i in range(int((high - low) / 0.2) + 1)]
    for v in ticks:
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>')
    for m in range(0, int(max(minutes)) + 1, 10):
        parts.append(f'<text x="{x(m):.1f}" y="{height - bottom + 16}" text-anchor="middle">{m}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">minutes of training</text>'
    )
    for key, label, colour in series:
        points = " ".join(f"{x(m):.1f},{y(c[key]):.1f}" for m, c in zip(minutes, curve, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{x(minutes[-1]) + 6:.1f}" y="{y(curve[-1][key]) + 4:.1f}" fill="{colour}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="the trainer's output folder")
    parser.add_argument("--eval", required=True, help="the JSON of recipes.evaluate")
    parser.add_argument("--name", required=True, help="the target, as people call it")
    parser.add_argument("--recipe", required=True, help="a text file: data and training in a few sentences")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    run, out = Path(args.run), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "hot_vocab.json"):
        shutil.copyfile(run / "draft" / name, out / name)
    config = json.loads((out / "config.json").read_text())
    curve = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    result = json.loads(Path(args.eval).read_text())
    lengths, positions, confidence = figures(result)
    (out / "curve.svg").write_text(curve_svg(curve))
    (out / "README.md").write_text(
        CARD.format(
            name=args.name,
            layers=config["num_hidden_layers"],
            block=config["block_size"],
            rank=config["markov_rank"],
            size=(out / "model.safetensors").stat().st_size / 1e6,
            prompts=result["prompts"],
            hot=len(json.loads((out / "hot_vocab.json").read_text())),
            figures=lengths,
            positions=positions,
            confidence=confidence,
            recipe=Path(args.recipe).read_text().strip(),
            curve=curve_table(curve),
        )
    )


if __name__ == "__main__":
    main()
