"""SGLang's door to us: called in every process of a server, it registers and hooks. A server that does not use us never
fails because of us.
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
        _refuse(str(error))
        return
    # Only now: these modules import SGLang at their top, which the check above has just found fit.
    from dspark_sgl.spec_algos.registry import discover

    from . import algorithm, cpu_attention, hooks

    cpu_attention.register()
    drafters, problems = discover()
    for problem in problems:
        logger.warning("%s", problem)
    for drafter in drafters.values():
        try:
            algorithm.register(drafter)
        except ValueError as error:  # a name that SGLang keeps for itself
            logger.warning("drafter %s is left out: %s", drafter.__name__, error)
    hooks.register()


def _refuse(reason: str) -> None:
    """Stay out of a server that does not use us; end, with one line, one that asks for an algorithm of ours."""
    from importlib.metadata import entry_points

    logger.warning("dspark-sgl stays out of this server: %s", reason)

    def end(server_args: object) -> None:
        raise SystemExit(f"error: {reason}")

    try:
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        # The drafters themselves may not import on such an SGLang; their entry points are named after them.
        for entry in entry_points(group="dspark_sgl.spec_algos"):
            SpeculativeAlgorithm.register(f"{entry.name}_SGL", validate_server_args=end)(end)
    except Exception as error:  # an SGLang so different that even this is gone calls the algorithm unknown
        logger.warning("and its algorithm names cannot be registered: %s", error)
