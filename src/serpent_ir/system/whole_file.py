"""The one place where files are made that exist whole or not at all."""

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

# The host's name is included because another host's locks may not be seen here, on a disk that both write to.
_PREFIX = f".serpent-{re.sub('[^A-Za-z0-9_.]', '_', platform.node())[:32]}-"
_SUFFIX = ".tmp"
_REST = 100  # the pause after a search, in lengths of it; so searches of large folders take 1 % of the time
_searched: dict[Path, float] = {}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` once it is on the disk. After an error `path` is as it was.

    Until then the file has another name in the same folder, and a lock. If several writers write the same path, each
    makes a whole file, and the last one to finish counts. What killed writers left in the folder, whose locks are gone,
    is removed. If `path` is a symbolic link, it is replaced, not followed. Raises OSError if the system refuses.
    """
    remove_left_behind(path.parent)
    file, temporary = _create(path.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:  # renamed while it is locked, since an unlocked file may be taken for the rest of a killed writer
                temporary.replace(path)
        if not fcntl:  # Windows cannot rename an open file
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A temporary folder of the system, removed at the end. Also removes those that killed calls of this name left."""
    parent = Path(tempfile.gettempdir())
    prefix = f"{_PREFIX[1:]}{name}-"
    if fcntl:
        for left in parent.glob(f"{glob.escape(prefix)}*"):
            with contextlib.suppress(OSError), _locked_folder(left):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, contextlib.ExitStack() as stack:
        if fcntl:
            with contextlib.suppress(OSError):  # on a disk without locks the folder stays if this process is killed
                stack.enter_context(_locked_folder(Path(folder)))
        yield Path(folder)


@contextmanager
def _locked_folder(path: Path) -> Iterator[None]:
    """Lock a folder of this user. OSError if somebody else holds it, or if it is not a folder."""
    folder = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        if os.fstat(folder).st_uid != os.getuid():
            raise PermissionError(path)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(folder)


def remove_left_behind(folder: Path) -> None:
    """Remove the unfinished files of this host's writers that are gone. Does nothing on systems without locks."""
    start = time.monotonic()
    if not fcntl or start < _searched.get(folder, 0.0):
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):  # another process was faster, or the file is not ours to remove
                    _remove_if_unlocked(Path(entry.path))
    end = time.monotonic()
    if len(_searched) > 1000:
        _searched.clear()
    _searched[folder] = end + _REST * (end - start)


def _create(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file, open and locked, with a name that nobody else uses."""
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
        file.close()  # another process removed it between creation and lock
        temporary.unlink(missing_ok=True)


def _lock(file: int) -> bool:
    """Lock a new file. False if another process holds or has removed it. On disks without locks it stays unlocked."""
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
    """Write a file that is always whole: it has either the old content or the new.

    Raises SerpentError if it cannot be written; the old file stays.
    """
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SerpentError(f"{path}: cannot be written ({reason}); make room and go on with --resume") from None
