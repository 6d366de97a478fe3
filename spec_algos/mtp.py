"""MTP: the extra prediction module that a target was trained with, or was given afterwards, used as a drafter.

    x   = input_proj [hidden_layernorm(h); token_layernorm(e)]
    y_i = final_layernorm(layer(x)),   logits = lm_head(y_i)

`h` is the target's final hidden state of position i, or `y_{i-1}` for a drafted one; `e` the target's embedding of the
token at i + 1 (0 at position 0); `lm_head` the target's. This is MiMo's module, which any dense target can carry; the
other `*MTP` and `*NextN` classes of SGLang differ inside and are used in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from sglang.srt.lora.layers import unwrap_lora_layer

from .draft_model import DraftHead, hot_vocabulary
from .recurrent import RecurrentDrafter


class MTPDrafter(RecurrentDrafter):
    """See the module. One module predicts one token ahead; deeper, it repeats itself on its own output, which it was
    not trained for. So the default depth is 1, and `--speculative-num-steps` allows more."""

    algorithm: ClassVar[str] = "MTP_SGL"
    default_depth: ClassVar[int] = 1
    final_hidden: ClassVar[bool] = True

    def _share(self, draft: Any, target: Any) -> DraftHead:
        embedding, head = target.get_embed_and_head()
        draft.set_embed_and_head(embedding, head)
        folder = Path(self._runner.model_config.model_path)
        return DraftHead(unwrap_lora_layer(target.lm_head), hot=hot_vocabulary(folder, head.device))
