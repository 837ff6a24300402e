"""Files that are there as a whole or not at all: the one place where they are made."""

import contextlib
import glob
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from serpent_ir.errors import SerpentError

if os.name == "posix":
    import fcntl
else:
    fcntl = None

# Of another host nothing can be known: its locks may not be seen here, on a disk that both write to.
_PREFIX = f".serpent-{re.sub('[^A-Za-z0-9_.]', '_', platform.node())[:32]}-"
_SUFFIX = ".tmp"
_REST = 100  # so many times as long as a search took, none comes after it: of large folders it takes 1 % of the time
_searched: dict[Path, float] = {}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` once it is on the disk; after an error `path` is as it was.

    Until then it has a name of its own in the same folder, and a lock: of several writers of one path each makes a
    whole file, and the last to end counts. What a kill left in the folder, whose lock is gone, is removed. A symbolic
    link of the name `path` is replaced, not followed. Raises OSError where the system does not let it.
    """
    remove_left_behind(path.parent)
    file, temporary = _create(path.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:  # while it is locked: an unlocked one may be taken for what a kill left
                temporary.replace(path)
        if not fcntl:  # Windows renames no open file
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary ones, removed at the end; and those that killed calls of this name left."""
    parent = Path(tempfile.gettempdir())
    prefix = f"{_PREFIX[1:]}{name}-"
    if fcntl:
        for left in parent.glob(f"{glob.escape(prefix)}*"):
            with contextlib.suppress(OSError), _locked_folder(left):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, contextlib.ExitStack() as stack:
        if fcntl:
            with contextlib.suppress(OSError):  # on a disk without locks it stays when this is killed
                stack.enter_context(_locked_folder(Path(folder)))
        yield Path(folder)


@contextmanager
def _locked_folder(path: Path) -> Iterator[None]:
    """Lock a folder of this user; OSError where somebody else holds it, or it is none."""
    folder = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        if os.fstat(folder).st_uid != os.getuid():
            raise PermissionError(path)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(folder)


def remove_left_behind(folder: Path) -> None:
    """Remove the unfinished files of writers of this host that are no more; nothing where there are no locks."""
    start = time.monotonic()
    if not fcntl or start < _searched.get(folder, 0.0):
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):  # another one was quicker, or it is not ours to remove
                    _remove_if_unlocked(Path(entry.path))
    end = time.monotonic()
    if len(_searched) > 1000:
        _searched.clear()
    _searched[folder] = end + _REST * (end - start)


def _create(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file, open and locked, by a name that nobody else has."""
    while True:
        temporary = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"
        file = temporary.open("x+b")
        try:
            if not fcntl or _lock(file.fileno()):
                return file, temporary
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        file.close()  # somebody who cleans up came between creation and lock
        temporary.unlink(missing_ok=True)


def _lock(file: int) -> bool:
    """Lock a new file; False where another process holds or removed it. Without a lock where the disk has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(file).st_nlink > 0


def _remove_if_unlocked(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(file)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is always whole: the old content or the new.

    Raises SerpentError where it cannot be written; the old file stays.
    """
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SerpentError(f"{path}: cannot be written ({reason}); make room and go on with --resume") from None
