"""A policy on a live server: edited while requests run, broken while requests run, and what the server says of it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_sgl.cli import main
from dspark_sgl.server import Server

from .conftest import seconds_until
from .questions import metric

pytestmark = pytest.mark.server

FIXED = "version: 1\nname: edited\nschedule: {{kind: fixed, depth: {depth}}}\n"
TIERED = FIXED.format(depth=5) + "tiers: {careful: {max_depth: 1}}\n"
BROKEN = "version: 1\nname: edited\nschedule: {kind: fixed, depht: 4}\n"


@pytest.fixture(scope="module")
def server(spec_server: Server, policy: Path) -> Iterator[Server]:
    """The shared server under a policy of ours, for as long as this file's tests run."""
    before = policy.read_text()
    spec_server.edit_policy(policy, FIXED.format(depth=5))
    yield spec_server
    spec_server.edit_policy(policy, before)


@pytest.fixture
def load(server: Server, prompts: list[str]) -> Iterator[list[str]]:
    """Four users who ask without a pause; yields the list of what went wrong for them."""
    failures: list[str] = []
    done = threading.Event()

    def ask(prompt: str) -> None:
        while not done.is_set():
            try:
                server.generate(prompt, temperature=0, max_new_tokens=48, ignore_eos=True)
            except Exception as error:
                failures.append(str(error))

    users = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts[:4]]
    for user in users:
        user.start()
    time.sleep(3)
    yield failures
    done.set()
    for user in users:
        user.join()


def test_a_saved_policy_is_in_force_within_a_second(server: Server, policy: Path, load: list[str]):
    seconds_until(lambda: metric(server, "depth") == 5)  # the first step of the load
    for depth in (1, 4, 0, 5):
        steps = metric(server, "steps_total")
        policy.write_text(FIXED.format(depth=depth))
        took = seconds_until(lambda depth=depth: metric(server, "depth") == depth)
        steps = metric(server, "steps_total") - steps
        # One second here. Where a step takes as long as that, since other things run as well, it is the next few steps.
        assert took < 3 or steps <= 6, f"depth {depth} after {took:.1f} s and {steps:.0f} steps"
    assert load == []


def test_a_broken_policy_changes_nothing_and_is_said_once(server: Server, policy: Path, load: list[str]):
    before, said = metric(server, "policy_reloads_total", result="refused"), len(server.log)
    policy.write_text(BROKEN)
    seconds_until(lambda: metric(server, "policy_reloads_total", result="refused") == before + 1)
    assert metric(server, "depth") == 5
    lines = [line for line in server.log[said:].splitlines() if f"{policy}:3:" in line]
    assert len(lines) == 1
    assert "did you mean 'depth'" in lines[0]
    policy.write_text(FIXED.format(depth=5))
    assert load == []


def test_top_shows_the_load(server: Server, load: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["top", "--once", "--interval", "2", "--url", server.url]) == 0
    rows = {line[:21].strip(): line[21:] for line in capsys.readouterr().out.splitlines()}
    assert re.search(r"running +[1-4] ", rows["requests"]), "SGLang counts every few steps"
    assert float(re.findall(r"all +([\d.]+)", rows["tokens/s"])[0]) > 1
    assert re.search(r"mean +5\.00", rows["depth"])
    assert {"draft", "verify", "engine"} <= set(re.findall("[a-z]+", rows["ms per step"]))
    assert load == []


def test_a_tier_limits_its_requests_only(server: Server, policy: Path, prompts: list[str]):
    policy.write_text(TIERED)
    seconds_until(lambda: "careful" in str(server.report()["tiers"]))
    free = server.generate(prompts[0], temperature=0, max_new_tokens=48)
    careful = server.generate(
        prompts[0], temperature=0, max_new_tokens=48, custom_params={"dspark": {"tier": "careful"}}
    )
    assert free.tokens == careful.tokens
    assert careful.accepted_length is not None and careful.accepted_length <= 2
    assert free.accepted_length is not None and free.accepted_length > careful.accepted_length


def test_the_server_says_what_it_does(server: Server):
    report = server.report()
    assert report["policy"] == "edited"
    assert re.fullmatch("[0-9a-f]{12}", str(report["digest"]))
    assert report["cost"] in ("profiled", "cached")
    assert metric(server, "policy", name="edited", digest=str(report["digest"])) == 1
    assert metric(server, "cost_ready") == 1
