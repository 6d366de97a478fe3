"""EAGLE-3: one decoder layer over the hidden states of three target layers, drafting token by token.

    h   = fc [H_l1; H_l2; H_l3]_i   for a committed position,   h = y_{i-1}   for a drafted one
    z   = [input_layernorm(E[t_{i+1}]); hidden_norm(h)]
    r   = h + attention(z),   y_i = r + mlp(post_attention_layernorm(r)),   logits = lm_head(norm(y_i))

The embedding is the target's; the head is the draft's own, usually over part of the vocabulary (`d2t`). SGLang's model
class computes this and captures the layers that the checkpoint's `eagle_config` names.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .draft_model import DraftHead
from .recurrent import RecurrentDrafter


class Eagle3Drafter(RecurrentDrafter):
    """See the module. Trained to feed on itself for several steps, so it drafts deep by default."""

    algorithm: ClassVar[str] = "EAGLE3_SGL"
    default_depth: ClassVar[int] = 7

    def _share(self, draft: Any, target: Any) -> DraftHead:
        embedding, head = target.get_embed_and_head()
        if draft.load_lm_head_from_target:
            draft.set_embed_and_head(embedding, head)
        else:
            draft.set_embed(embedding)
        vocab = draft.hot_token_id
        return DraftHead(draft.lm_head, vocab=None if vocab is None else vocab.to(head.device))
