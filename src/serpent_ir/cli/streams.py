"""stdout and stderr of the command: errors of the first name it, and those of the second stop no work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

STDOUT = "standard output"


class Results:
    """stdout. Where it cannot be written, the OSError names it as a file's names that, and the rest goes nowhere."""

    error: ClassVar[OSError | None] = None

    def __init__(self, stream: Any):
        self._stream = stream

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # else Python tries once more at exit, and prints a traceback
            os.close(null)
            Results.error = OSError(error.errno, error.strerror, STDOUT)  # a BrokenPipeError where that is what it was
            raise Results.error from None

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Messages(Results):
    """stderr. Where it cannot be written, nobody can be told, and the work goes on."""

    @contextmanager
    def _named(self) -> Iterator[None]:
        with suppress(OSError):
            yield


def install() -> None:
    """Put these in place.

    Streams that the shell closed lead nowhere from now on. Their numbers would else go to the next files that are
    opened, and libraries in C write their messages to number 2 whatever it is.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(null, True)
    os.close(null)
    out, err = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout, sys.stderr = Results(out), Messages(err)


def end(status: int) -> int:
    """Write what is left, and return the exit status: 1, and a line, in place of 0 if stdout could not be written."""
    with suppress(OSError):
        sys.stdout.flush()
    if status or not Results.error:
        return status
    if not isinstance(Results.error, BrokenPipeError):  # its reader has ended, as in `serpent models | head -1`
        sys.stderr.write(f"serpent: error: {STDOUT}: {Results.error.strerror}\n")
    return 1
