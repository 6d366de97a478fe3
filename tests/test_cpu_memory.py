"""On our CPU platform what a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
if len(sys.argv) > 1:
    import sglang
    from dspark_sgl.cpu_platform import keep_freed_memory
    keep_freed_memory()
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(8):  # an aligned block does not fit where one of its size has just been: a few lie side by side
    touch()
print(sum(touch() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_large_block_comes_back_without_a_fault_for_each_page() -> None:
    """64 MiB, as large as the logits of a large round."""

    def faults(*kept: str) -> int:
        command = [sys.executable, "-W", "ignore", "-c", FAULTS, *kept]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    assert 4 * faults("kept") < faults()  # a page has 4 KiB or, where the system is generous, 2 MiB
