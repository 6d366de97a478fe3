"""The whole server samples what the target would: chi-square of the first three tokens over 50,000 samples.

A target with twelve tokens, so that every continuation's exact probability is known; the draft is random. Chain
rejection and match, temperature 1 and 0.7 with top-p 0.9. The same statistic rejects a target that is off by five
percent in temperature, so it has the power to see a bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from dspark_sgl.kernels.filters import Filters, filtered_probs
from dspark_sgl.server import Server

from . import tiny_models

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

PROMPT = [1, 5, 3, 8, 2]
SAMPLES, PER_REQUEST = 50_000, 250
Text = tuple[int, int, int]

POLICIES = {
    "rejection": "schedule: {kind: fixed, depth: 4}\naccept: {method: rejection}\n",
    "match": "schedule: {kind: fixed, depth: 4}\naccept: {method: match}\n",
    # How deep depends on the confidence of what was drafted: the case that a careless scheduler gets wrong.
    "by confidence": "schedule: {kind: threshold, confidence: 0.25}\naccept: {method: rejection}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_target(folder / "target")
    tiny_models.write_draft(folder / "draft")
    return folder


@pytest.fixture(scope="module", params=POLICIES)
def server(request: pytest.FixtureRequest, models: Path) -> Iterator[Server]:
    policy = models / f"{request.param}.yaml"
    policy.write_text(f"version: 1\n{POLICIES[request.param]}")
    arguments = [
        *("--model-path", str(models / "target"), "--speculative-draft-model-path", str(models / "draft")),
        *("--speculative-algorithm", "DSPARK_SGL", "--dspark-policy", str(policy)),
        *("--dtype", "float32", "--skip-tokenizer-init", "--max-total-tokens", "8192", "--max-running-requests", "250"),
    ]
    with Server(arguments) as running:
        yield running


def samples(server: Server, temperature: float, top_p: float) -> Counter[Text]:
    def ask(_: int) -> list[Text]:
        answers = server.post(
            "/generate",
            {
                "input_ids": PROMPT,
                "sampling_params": {
                    "n": PER_REQUEST,
                    "temperature": temperature,
                    "top_p": top_p,
                    "max_new_tokens": 3,
                    "ignore_eos": True,
                },
            },
        )
        return [tuple(answer["output_ids"]) for answer in answers]

    with ThreadPoolExecutor(2) as pool:
        return Counter(text for texts in pool.map(ask, range(SAMPLES // PER_REQUEST)) for text in texts)


def exact(models: Path, temperature: float, top_p: float) -> dict[Text, float]:
    """p(a) p(b | a) p(c | a, b) of every text, from the target alone."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(models / "target").float().eval()
    pairs = list(product(range(tiny_models.VOCAB), repeat=2))
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *pair] for pair in pairs])).logits[:, len(PROMPT) - 1 :]
    rows = torch.ones(len(pairs) * 3)
    filters = Filters(rows * temperature, (rows * tiny_models.VOCAB).long(), rows * top_p, rows * 0, active=top_p < 1)
    p = filtered_probs(logits.flatten(0, 1), filters).view(len(pairs), 3, -1).double()
    return {
        (a, b, c): float(p[i, 0, a] * p[i, 1, b] * p[i, 2, c])
        for i, (a, b) in enumerate(pairs)
        for c in range(tiny_models.VOCAB)
    }


def p_value(counts: Counter[Text], expected: dict[Text, float]) -> float:
    """Chi-square, cells that expect fewer than five samples pooled; a text the target cannot write is certain proof."""
    total = sum(counts.values())
    if any(expected[text] == 0 for text in counts):
        return 0.0
    common = [text for text, p in expected.items() if p * total >= 5]
    observed = [counts[text] for text in common]
    wanted = [expected[text] * total for text in common]
    if total - sum(wanted) > 1e-6 * total:
        observed, wanted = [*observed, total - sum(observed)], [*wanted, total - sum(wanted)]
    scale = total / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_the_servers_samples_are_the_targets(server: Server, models: Path, temperature: float, top_p: float) -> None:
    counts = samples(server, temperature, top_p)
    assert sum(counts.values()) == SAMPLES
    assert p_value(counts, exact(models, temperature, top_p)) > 1e-4
    assert p_value(counts, exact(models, temperature * 1.05, top_p)) < 1e-6
    assert server.report()["counts"]["drafted"] > 0
