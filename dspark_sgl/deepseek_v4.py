"""DeepSeek-V4: `DSPARK_SGL` is handed over to SGLang's own `DSPARK`, whose class loads the draft in its checkpoints.

Its attention is latent and compressed: no mask of ours fits it, and SGLang keeps its state for the algorithms that it
knows by name. So SGLang's own worker drafts chains of this target; what we have beside it (policies, trees, metrics)
is not there, and who asks for a policy is told so. Never touches another target.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.speculative.dspark_components.dspark_config import checkpoint_bundles_dspark_draft

from .algorithm import is_ours
from .settings import POLICY_VARIABLE

logger = logging.getLogger(__name__)

OURS, THEIRS = "DSPARK_SGL", "DSPARK"


def hand_over(server_args: Any, _architecture: str) -> None:
    """Called before SGLang looks at the settings of a DeepSeek-V4 server. Ends the launch, in one line, where its own
    algorithm could not do what was asked of ours."""
    view = resolving_view(server_args)
    asked = view.speculative_algorithm
    if not is_ours(asked):
        return
    draft = view.speculative_draft_model_path
    bundled = checkpoint_bundles_dspark_draft(model_config_of(server_args).hf_config)
    if problem := _problem(asked.upper(), view.device, bundled or draft is not None):
        raise SystemExit(f"error: {view.model_path}: {problem}")
    logger.info("%s: SGLang's own %s serves DeepSeek-V4, with the draft in %s", OURS, THEIRS, draft or "its checkpoint")
    declare_resolution(server_args, "dspark_sgl", speculative_algorithm=THEIRS)


def _problem(asked: str, device: str, has_draft: bool) -> str | None:
    without = f"start without --speculative-algorithm {asked}"
    if asked != OURS:
        return f"DeepSeek-V4 has latent attention, which takes no mask of ours; use {OURS}, which SGLang's own serves"
    if device == "cpu":
        return f"SGLang serves DeepSeek-V4 on no CPU; {without}, on a GPU"
    if not has_draft:
        return f"this DeepSeek-V4 has no DSpark draft in its config (dspark_block_size and others); {without}"
    if policy := os.environ.get(POLICY_VARIABLE):
        return f"SGLang's own {THEIRS}, which serves DeepSeek-V4, follows no policy; remove --dspark-policy {policy}"
    return None
