"""Pictures by matplotlib, which is an extra: one line where it is missing, one line where a file cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .policies.errors import PolicyError


def new_figure(option: str, width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure`, inches; option: what the user asked for it with"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PolicyError(option, 0, 0, "needs matplotlib: pip install 'dspark-sgl[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise PolicyError(str(file), 0, 0, f"cannot be written: {error}") from None
