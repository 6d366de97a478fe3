"""Put a trained draft where it ships: checkpoint files, a model card with the measured figures, a curve as SVG.

Every number in the card comes from the files given; nothing is measured, trained or fetched here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from recipes.curves import draw, read_curve

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


def figures(result: dict[str, Any]) -> tuple[str, str, str]:
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


def curve_table(curve: list[dict[str, Any]]) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="the trainer's output folder")
    parser.add_argument("--eval", required=True, help="the JSON of recipes.evaluate")
    parser.add_argument("--name", required=True, help="the target, as people call it")
    parser.add_argument("--recipe", required=True, help="a text file: data and training in a few sentences")
    parser.add_argument("--out", required=True, help="the folder to ship")
    args = parser.parse_args()
    run, out = Path(args.run), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "hot_vocab.json"):
        shutil.copyfile(run / "draft" / name, out / name)
    config = json.loads((out / "config.json").read_text())
    curve = read_curve(run)
    result = json.loads(Path(args.eval).read_text())
    lengths, positions, confidence = figures(result)
    lines = {
        label: [(point["seconds"] / 60, point[key]) for point in curve]
        for key, label in (("expected_t1", "temperature 1"), ("length_t0", "temperature 0"))
    }
    draw(lines, "minutes of training", "accepted length", out / "curve.svg")
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
