"""Measurements, each with a command of its own. Asked to end, one unwinds, so that the servers it has started end too."""

import signal
import sys
import threading

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
