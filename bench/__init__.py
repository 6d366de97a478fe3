"""Measurements, each a command. One that is asked to end unwinds, so that the servers it has started end with it."""

import signal
import sys
import threading

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
