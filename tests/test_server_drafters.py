"""Drafters of other packages, found by entry point: they serve exactly, as chains and as trees."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dspark_sgl.server import Server

from .conftest import SHARED, chat
from .test_server import together

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

REPETITIVE = chat("Repeat this sentence five times: The cat sat on the mat and looked at the moon.")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an installed package with two drafters."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).parent / "toy_drafter.py", folder / "toy_drafter.py")
    info = folder / "toy_drafter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-drafter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dspark_sgl.spec_algos]\nrepeat = toy_drafter:RepeatDrafter\nbranch = toy_drafter:BranchingDrafter\n"
    )
    return folder


def test_a_toy_drafter_is_short() -> None:
    source = (Path(__file__).parent / "toy_drafter.py").read_text().split("class BranchingDrafter")[0]
    assert len(source.splitlines()) < 40


@pytest.mark.parametrize("algorithm", ["REPEAT_SGL", "BRANCH_SGL"])
def test_it_serves_the_tokens_of_plain_decoding(
    algorithm: str, elsewhere: Path, target: Path, plain_server: Server, prompts: list[str]
) -> None:
    asked = [REPETITIVE, *prompts[:7]]
    wanted = together(plain_server, asked, temperature=0, max_new_tokens=64)
    arguments = ["--model-path", str(target), "--speculative-algorithm", algorithm]
    with Server([*arguments, "--dspark-policy", "fixed-7", *SHARED], {"PYTHONPATH": str(elsewhere)}) as server:
        got = together(server, asked, temperature=0, max_new_tokens=64)
        assert [a.tokens for a in got] == [a.tokens for a in wanted]
        accepted = got[0].accepted_length
        assert accepted is not None and accepted > 1.5, "the sentence repeats; the drafter should have seen it"
        with ThreadPoolExecutor(8) as pool:
            sampled = pool.map(lambda p: server.generate(p, temperature=1.0, max_new_tokens=32), asked)
        assert all(answer.tokens for answer in sampled)
