"""Calls of `serpent` in forked children: torch is imported once, in the parent: a call costs tenths of a second.

A child is bounded by time, and killed with all that it started.
"""

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from serpent_ir import cli


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status, negative for a signal, and what it wrote; `hung` where it had to be killed."""

    status: int
    said: str
    seconds: float
    hung: bool = False

    @property
    def last(self) -> str:
        lines = self.said.strip().splitlines()
        return lines[-1] if lines else ""


class Child:
    """A forked child that runs `work` in a folder; what it writes goes through a pipe, for disks may be full."""

    def __init__(self, work: Callable[[], int], folder: Path, limits: dict[int, int] | None = None):
        self._read, write = os.pipe()
        sys.stdout.flush()
        self.begun = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            _work(work, folder, limits or {}, write)
        os.close(write)
        os.set_blocking(self._read, False)
        self._said = bytearray()
        while b"\0" not in self._said and not self._over(False):  # it is ready for signals
            time.sleep(0.001)
        self.begun = time.monotonic()

    def send(self, sent: int) -> None:
        if not self._over(False):
            os.kill(self.pid, sent)

    def read(self) -> None:
        """Take what it has written so far: it would wait for ever once the pipe is full."""
        self._over(False)

    _status: int | None = None

    def _over(self, wait: bool) -> bool:
        while True:
            try:
                if not (more := os.read(self._read, 1 << 16)):
                    break
                self._said += more
            except BlockingIOError:
                break
        if self._status is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def end(self, seconds: float = 60, meanwhile: Sequence[tuple[float, Callable[[], None]]] = ()) -> Ended:
        """Wait for it, at most so long; `meanwhile` are functions to call at times since it began."""
        waiting = sorted(meanwhile, key=lambda item: item[0])
        hung = False
        while not self._over(False):
            now = time.monotonic() - self.begun
            while waiting and waiting[0][0] <= now:
                waiting.pop(0)[1]()
            if now > seconds:
                hung = True
                self.kill()
                self._over(True)
                break
            time.sleep(0.002)
        took = time.monotonic() - self.begun
        self.kill()
        self._over(False)
        os.close(self._read)
        said = bytes(self._said).replace(b"\0", b"").decode(errors="replace")
        return Ended(self._status or 0, said, took, hung)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _work(work: Callable[[], int], folder: Path, limits: dict[int, int], write: int) -> NoReturn:
    status = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(write, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        for which, bound in limits.items():
            size = _virtual_bytes() + bound if which == resource.RLIMIT_AS else bound
            resource.setrlimit(which, (size, resource.getrlimit(which)[1]))
        os.write(write, b"\0")
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _virtual_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) << 10


def serpent(*args: str) -> Callable[[], int]:
    """What runs `serpent` with these arguments, and returns its status."""

    def work() -> int:
        sys.argv = ["serpent", *args]
        try:
            cli.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    return work
