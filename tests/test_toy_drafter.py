"""Writing a drafter is little work: `toy_drafter.py`, which test_server_algorithms.py serves, fits a page."""

from pathlib import Path


def test_a_toy_drafter_is_short() -> None:
    source = (Path(__file__).parent / "toy_drafter.py").read_text().split("class BranchingDrafter")[0]
    assert len(source.splitlines()) < 40
