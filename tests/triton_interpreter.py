"""Triton without a GPU: its interpreter, for the kernels imported under `interpreted()` and for nobody else.

Whether a function is interpreted is settled when it is decorated, Triton's own library included. So triton is imported
here, before any test module does it, and the variable is taken back at once: servers that tests start never see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

HAVE_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAVE_GPU else "cpu"
_VARIABLE = "TRITON_INTERPRET"


@contextmanager
def interpreted() -> Iterator[None]:
    """What is decorated inside is interpreted, unless there is a GPU to compile it for."""
    before = os.environ.get(_VARIABLE)
    if not HAVE_GPU:
        os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


if find_spec("triton") is not None:
    with interpreted():
        # gluon as well: it insists on being decorated as the rest of triton was.
        import triton.experimental.gluon.language
        import triton.language  # noqa: F401
