"""What can come between two steps: a signal, the end of the time that a run was given, a checkpoint that is due."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from serpent_ir.errors import SerpentError


class StoppedError(SerpentError):
    """A run was asked to end early, and was saved. `status` is the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


OUT_OF_TIME, SAVE = 1000, 1
"""Answers of `Stop.asked` if the time is over and if a checkpoint is due. The numbers of signals lie between them."""


IMPATIENT = 2.0
"""Seconds after which a second Ctrl-C counts as another one.

Before that it may be the same one, which launchers pass on.
"""


SAVE_SECONDS = 600.0
"""Most seconds between checkpoints, however far apart validations are."""


class Stop:
    """Records what the run should do after the current step."""

    def __init__(self, minutes: float | None):
        self.signal, self._since = 0, 0.0
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    def asked(self) -> int:
        """The number of a signal, `OUT_OF_TIME`, `SAVE` or 0. With several processes the largest answer counts."""
        now = time.monotonic()
        if self.until is not None and now >= self.until:
            return OUT_OF_TIME
        return self.signal or (SAVE if now - self.saved >= SAVE_SECONDS else 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat SIGINT and SIGTERM as a request. A second Ctrl-C, some seconds later, acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since > IMPATIENT:
            raise KeyboardInterrupt


def told(reason: int) -> str:
    """The reason in words."""
    if reason == OUT_OF_TIME:
        return "the time is over"
    return "stopped by Ctrl-C" if reason == signal.SIGINT else f"stopped by {signal.Signals(reason).name}"


def status(reason: int) -> int:
    """The exit status by the convention of shells: 128 plus the signal's number."""
    return 128 + reason
