"""What comes between two steps: a signal, the end of the time that a run was given, a checkpoint that is due."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from serpent_ir.errors import SerpentError


class StoppedError(SerpentError):
    """A run that was asked to end early, and saved; `status` is the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


OUT_OF_TIME, SAVE = 1000, 1
"""What `Stop.asked` says when the time is over, and when a checkpoint is due; numbers of other signals lie between."""


IMPATIENT = 2.0
"""Seconds after which another Ctrl-C means it. Before, it is the same one: a launcher hands it on to its processes."""


SAVE_SECONDS = 600.0
"""Between checkpoints at most, however far validations are apart."""


class Stop:
    """Notes what the run should do after the step it is at."""

    def __init__(self, minutes: float | None):
        self.signal, self._since = 0, 0.0
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    def asked(self) -> int:
        """The number of a signal, `OUT_OF_TIME`, `SAVE` or 0; of several processes the largest answer counts."""
        now = time.monotonic()
        if self.until is not None and now >= self.until:
            return OUT_OF_TIME
        return self.signal or (SAVE if now - self.saved >= SAVE_SECONDS else 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a wish; Ctrl-C after some seconds once more acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
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
    """The exit status that shells know: 128 and the signal's number."""
    return 128 + reason
