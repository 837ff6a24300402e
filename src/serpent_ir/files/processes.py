"""Reads and writes images in other processes, since only one thread of a Python process runs at a time.

Beside a GPU that is what a folder of images would wait for: reading and writing a small one keeps Python busy for two
milliseconds, and the network takes less than half of one.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from serpent_ir.errors import SerpentError, is_out_of_memory

Result = TypeVar("Result")
_DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


class Processes:
    """Calls functions in other processes; in this one if there are none, or one of them was killed.

    They are forked when this is made, which is only done where nothing forbids it: on Linux, before this process has
    used a GPU, and while it has no other thread. They end with this process, however it ends.
    """

    def __init__(self, count: int):
        self._pool: ProcessPoolExecutor | None = None
        if count < 1 or sys.platform != "linux" or torch.cuda.is_initialized() or threading.active_count() > 1:
            return
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (os.getpid(),))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own threads, which are idle
                pool.submit(int).result()  # the first call forks all of them
        except (BrokenExecutor, OSError):
            pool.shutdown(wait=False)
            return
        self._pool = pool

    def __call__(self, function: Callable[..., Result], *args: Any) -> Result:
        """function(*args), with its warnings. Everything must be picklable; errors are SerpentErrors and OSErrors."""
        if (pool := self._pool) is not None:
            try:
                result, error, notes = pool.submit(_called, function, args).result()
            except (BrokenExecutor, pickle.PicklingError, RuntimeError):
                self._pool = None
                pool.shutdown(wait=False, cancel_futures=True)
                return function(*args)
            for note in notes:
                warnings.warn(note, stacklevel=2)
            if error is not None:
                raise error
            return result
        return function(*args)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin(parent: int) -> None:
    """A signal for all processes of a terminal is for the one that started these."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was said
        os._exit(0)


def _called(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file
        result = error = None
        try:
            result = function(*args)
        except (SerpentError, OSError) as known:
            error = known
        except Exception as other:  # it may not survive the way
            said_first = str(other).partition("\n")[0]
            error = SerpentError(f"unexpected {type(other).__name__}: {said_first}")
            if is_out_of_memory(other):
                error = MemoryError(said_first)
    return result, error, [str(note.message) for note in said if issubclass(note.category, UserWarning)]
