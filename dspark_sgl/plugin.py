"""SGLang's door to us: called in every process of a server, it registers and hooks, and never fails a server that does not
use us.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def load() -> None:
    """Entry point of `sglang.srt.plugins`."""
    from .compat import CompatError, require

    try:
        require()
    except CompatError as error:
        logger.warning("dspark-sgl stays out of this server: %s", error)
        return
    # Only now: these modules import SGLang at their top, which the check above has just found fit.
    from dspark_sgl.spec_algos.registry import discover

    from . import algorithm, cpu_attention, hooks

    cpu_attention.register()
    drafters, problems = discover()
    for problem in problems:
        logger.warning("%s", problem)
    for drafter in drafters.values():
        algorithm.register(drafter)
    hooks.register()
