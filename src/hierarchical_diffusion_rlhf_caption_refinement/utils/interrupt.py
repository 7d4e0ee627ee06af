"""Ctrl-C that waits for a good moment."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Work was asked to stop and did, after saving `path` (None: nothing was to be saved)."""

    def __init__(self, path: Path | None, step: int) -> None:
        super().__init__(f"stopped after update {step}" + (f"; {path} holds all that is needed to go on from there" if path else ""))
        self.path, self.step = path, step


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list, for a loop to look at; the same signal a second time stops at once."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number in caught:
            raise KeyboardInterrupt
        caught.append(number)
        os.write(2, b"\nstopping at the next safe moment (once more: at once, without saving)\n")  # print is not safe in a handler

    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield caught
        return
    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
