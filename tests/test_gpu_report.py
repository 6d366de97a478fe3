"""The GPU runner as far as a CPU can go: every case runs on both sides, and its page says what has not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_runner_runs_its_cases_without_a_gpu() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(ROOT / "bench/gpu/run"), "--small"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b1 passed", done.stdout) and "not run, no GPU" in done.stdout
    rows = [line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == "operation" and len(rows) == 2 + 8
    for operation in ("draw", "sequential head", "children", "chain rejection", "tree rejection", "walk", "mask"):
        assert any(row.startswith(operation) for row in rows)


def test_the_page_begins_as_the_runner_writes_it() -> None:
    from bench.gpu.report import HEAD

    assert (ROOT / "docs" / "gpu.md").read_text().startswith(HEAD)


def test_a_new_section_goes_before_the_others_and_after_the_introduction() -> None:
    from bench.gpu.report import HEAD, with_section

    page = HEAD + "\n## Summary\n\nText.\n\n## 2026-01-01, a card\n\nOld.\n"
    found = with_section(page, "## 2026-02-02, a card\n\nNew.\n")
    assert found == page.replace("## 2026-01-01", "## 2026-02-02, a card\n\nNew.\n\n## 2026-01-01")
    assert with_section(HEAD, "## 2026-02-02, a card\n") == HEAD + "\n## 2026-02-02, a card\n"
