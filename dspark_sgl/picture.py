"""Pictures by matplotlib, which is an extra: one line where it is missing, one line where a file cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .launch import check_output
from .policies.errors import PolicyError


def check_picture(option: str, file: Path | None) -> None:
    """Before the work, not after: matplotlib is there, it draws files of this kind, and `file` can be written."""
    if file is None:
        return
    kinds = new_figure(option, 1, 1).canvas.get_supported_filetypes()
    check_output(option, file)
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise PolicyError(option, 0, 0, f"{file} must end in .png, .svg or .pdf")


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
