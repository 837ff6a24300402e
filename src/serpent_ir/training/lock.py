"""A run's folder belongs to one training at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serpent_ir.errors import SerpentError


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other trainings out of it while this one works; a kill leaves no lock behind.

    Lets all in on systems and disks that have no locks. Raises SerpentError where the folder cannot be made, or another
    training is at work there, whose half-written checkpoint this one would take for what a kill left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SerpentError(f"{folder}: cannot be made a folder ({error.strerror}); choose another out=") from None
    except ValueError:  # a character that no file system takes, nor a terminal
        raise SerpentError(f"{str(folder)!a}: cannot be the name of a folder; choose another out=") from None
    if os.name != "posix":
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SerpentError(
                f"{folder}: another training is at work there; stop it, or choose another out="
            ) from None
        except OSError:  # a disk of another host may know no locks
            pass
        yield
    finally:
        os.close(held)
