"""SIGINT and SIGTERM: the first asks a run to stop after its step and save, the second ends the process at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Ctrl-C under torchrun comes twice: from the terminal, and from torchrun, which passes on what it gets.
ONE_WISH_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event; a later one ends the process with 128 + its number."""
    stop, first = threading.Event(), 0.0

    def handle(number, _frame):
        nonlocal first
        if not stop.is_set():
            stop.set()
            first = time.monotonic()
            with suppress(OSError):  # who read it may be gone: Ctrl-C ends `| tee log`, too
                # print is not safe in a handler
                os.write(2, b"\nStopping after this step; once more to stop at once.\n")
        elif time.monotonic() - first >= ONE_WISH_SECONDS:
            os._exit(128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
