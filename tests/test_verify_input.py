"""What SGLang asks of a verify input of the kind that ours says it is."""

import inspect

from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.speculative.spec_info import SpecInputType

from dspark_sgl.verify_input import VerifyInput


def test_flashinfers_call_for_this_kind_of_input_is_understood():
    """Read off the source, since the call itself takes a GPU."""
    source = inspect.getsource(flashinfer_backend)
    branch = source[source.index(f"SpecInputType.{SpecInputType.DFLASH_VERIFY.name}:") :]
    call = branch[branch.index("generate_attn_arg_prefill(") :].split("else:")[0]
    passed = {line.partition("=")[0].strip() for line in call.splitlines() if "=" in line}
    assert "kv_start_idx" in passed
    assert passed <= set(inspect.signature(VerifyInput.generate_attn_arg_prefill).parameters)
