"""Locks, and other state of a process, for programs that fork while their threads are at work.

A forked child has one thread. A lock that another thread held at the fork is held forever there, unless it is renewed.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[[], None])


class Lock:
    """A `threading.Lock` for `with`. In a forked child it is free, except for the thread that forked while holding it.

    A copy made by `copy.deepcopy` or `pickle` is a new lock, so that objects that hold a lock can be copied.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._owner: int | None = None
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()

    def renew(self) -> None:
        """Replace the lock, in a child."""
        self._lock = threading.Lock()
        if self._owner == threading.get_ident():  # this thread forked while holding it, and still does
            self._lock.acquire()
        else:
            self._owner = None


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def in_child(function: Function) -> Function:
    """Call a function in every forked child, after the locks were renewed.

    On systems without forks it is never called.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


@in_child
def _renew_locks() -> None:
    for lock in list(_locks):
        lock.renew()
