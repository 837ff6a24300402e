"""Ctrl-C for the command `serpent`: one line and status 130, from the first moment to the last.

While Python imports, a KeyboardInterrupt may be swallowed or printed by whatever code meets it. So none is raised then.
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
    """From now on Ctrl-C ends this process at once, except inside `working`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in a shell's background it is ignored
        signal.signal(signal.SIGINT, _stop)


@contextmanager
def working() -> Iterator[None]:
    """Inside this context Ctrl-C raises KeyboardInterrupt, so that unfinished work is cleaned up."""
    global _working
    _working = True
    try:
        yield
    finally:
        _working = False


def _stop(_: int, frame: FrameType | None) -> None:
    # Other threads may be writing files. If there are none, nothing was begun before the imports are done.
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
