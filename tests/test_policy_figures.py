"""The figures in the headers of the shipped policies are what `policy simulate` says, with its defaults."""

from __future__ import annotations

import json

import pytest

from dspark_sgl.cli import main
from dspark_sgl.policies.shipped import policy_source, shipped_names

USERS = "4,128"


def header(name: str, speeds: list[float]) -> str:
    few, many = (round(speed) for speed in speeds)
    return f"# Simulated (policy simulate {name} --users {USERS}): {few} and {many} tokens/s per user."


@pytest.mark.parametrize("name", shipped_names())
def test_a_header_says_what_the_simulator_says(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["policy", "simulate", name, "--users", USERS, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    expected = header(name, [point["user_tps"] for point in points])
    assert expected in policy_source(name)[1].decode().splitlines()
