"""Ctrl-C for the command `serpent`: one line and status 130, from the first moment to the last.

While Python imports, a KeyboardInterrupt may be swallowed, or be printed by whoever met it, so it is not raised there.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LINE = "serpent: interrupted"
_working = False


def install() -> None:
    """From now on Ctrl-C ends this process at once, but for what is inside `working`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background of a shell
        signal.signal(signal.SIGINT, _stop)


@contextmanager
def working() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that what is half done is cleared away."""
    global _working
    _working = True
    try:
        yield
    finally:
        _working = False


def _stop(_: int, frame: FrameType | None) -> None:
    # Other threads may be writing files; where there are none, nothing is begun before its imports are done.
    if _working and not (threading.active_count() == 1 and _importing(frame)):
        raise KeyboardInterrupt
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{LINE}\n".encode())
    os._exit(130)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
