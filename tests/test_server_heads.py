"""Every kind of DSpark head, and the released layout of DFlash, drafts on a real server what plain torch computes.

`test_server_algorithms.py` judges what comes of drafts; here it is the drafts themselves, of the checkpoints that it
does not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from . import tiny_drafts, tiny_models
from .draft_reference import BlockReference, DSparkReference, ReleasedDFlashReference, expect_rounds_of
from .tiny_server import tiny_server
from .trials import policy_text, run_rounds

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("algorithm", "write", "reference"),
    [
        ("DSPARK_SGL", partial(tiny_drafts.write_dspark, head="gated"), DSparkReference),
        ("DSPARK_SGL", partial(tiny_drafts.write_dspark, head="rnn", layers=2), DSparkReference),
        ("DFLASH_SGL", partial(tiny_drafts.write_dflash, deepspec=True), ReleasedDFlashReference),
    ],
    ids=["gated", "rnn", "released DFlash"],
)
def test_a_checkpoint_drafts_what_its_equations_say(
    algorithm: str, write: Callable[[Path], None], reference: type[BlockReference], tmp_path: Path
) -> None:
    model = tiny_models.write_target(tmp_path / "target")
    write(tmp_path / "draft")
    (tmp_path / "policy.yaml").write_text(policy_text("match"))
    with tiny_server(tmp_path, "--chunked-prefill-size", "128", algorithm=algorithm) as server:
        answers = run_rounds(server)
    assert len(answers) == 24
    expect_rounds_of(reference(model, tmp_path / "draft"), answers)
