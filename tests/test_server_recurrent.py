"""Eagle3 and MTP draft what their module says, on a real server: every round accepts as many as a recomputation does.

Wrong hidden states, a token off by one or a stale row would leave the output exact and only be accepted less often; so
the drafts themselves are compared. Under `accept: match` they are greedy whatever the target samples, hence a function
of the text alone: the text a request wrote says how many drafts each of its rounds must have accepted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import LlamaForCausalLM

from dspark_sgl.server import Server

from . import tiny_models
from .draft_reference import DraftReference, Eagle3Reference, MTPReference
from .tiny_drafts import write_eagle3, write_mtp

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

DEPTH, WRITTEN = 4, 40
REFERENCES = {"EAGLE3_SGL": (write_eagle3, Eagle3Reference), "MTP_SGL": (write_mtp, MTPReference)}


@pytest.fixture(scope="module", params=REFERENCES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """A server and the recomputation of its draft. Chunks of 16 tokens, and a KV pool that evicts and retracts."""
    write, reference = REFERENCES[request.param]
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_target(folder / "target")
    write(folder / "draft")
    policy = folder / "policy.yaml"
    policy.write_text(f"version: 1\nschedule: {{kind: fixed, depth: {DEPTH}}}\naccept: {{method: match}}\n")
    arguments = [
        *("--model-path", str(folder / "target"), "--speculative-draft-model-path", str(folder / "draft")),
        *("--speculative-algorithm", request.param, "--speculative-num-steps", str(DEPTH)),
        *("--dspark-policy", str(policy), "--dtype", "float32", "--skip-tokenizer-init"),
        *("--chunked-prefill-size", "16", "--max-total-tokens", "600", "--max-running-requests", "8"),
    ]
    model = LlamaForCausalLM.from_pretrained(folder / "target").float().eval()
    with Server(arguments) as server:
        yield server, reference(model, folder / "draft")


def prompts() -> list[list[int]]:
    """Short ones, ones of several chunks, and ones that continue another, for the radix cache to find."""
    draw = random.Random(0)
    fresh = [[draw.randrange(1, tiny_models.VOCAB) for _ in range(n)] for n in (2, 5, 16, 17, 33, 60)]
    return [*fresh, *([*prompt, draw.randrange(1, tiny_models.VOCAB)] for prompt in fresh), fresh[-1], fresh[-2]]


def test_every_round_accepts_what_the_module_itself_says(served: tuple[Server, DraftReference]) -> None:
    server, reference = served
    asked = prompts()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda prompt: server.post(
                    "/generate",
                    {
                        "input_ids": prompt,
                        "sampling_params": {"temperature": 1.0, "max_new_tokens": WRITTEN, "ignore_eos": True},
                    },
                ),
                [*asked, *asked],
            )
        )
    accepted = 0
    for prompt, answer in zip([*asked, *asked], answers, strict=True):
        expected = reference.rounds(prompt, answer["output_ids"], DEPTH)
        got = answer["meta_info"]["spec_correct_drafts_histogram"]
        # The last round may have accepted more than the request was allowed to write.
        last = Counter(expected[:-1])
        extra = Counter({hits: n - last[hits] for hits, n in enumerate(got)})
        assert min(extra.values()) >= 0 and extra.total() == 1, (expected, got)
        assert next(hits for hits, n in extra.items() if n) >= expected[-1]
        accepted += sum(expected)
    assert accepted > len(answers) / 2, "a draft that is never right proves nothing"
    assert any(answer["meta_info"]["cached_tokens"] > 0 for answer in answers)
