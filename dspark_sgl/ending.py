"""How a program that starts servers ends when it is told to. Ends nothing itself."""

import signal
import sys


def unwind_when_told_to_end() -> None:
    """SIGTERM ends this program as Ctrl-C does, and so its servers with it. For a `main`, in its main thread."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
