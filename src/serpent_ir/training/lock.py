"""Makes sure that a run's folder belongs to one training at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serpent_ir.errors import SerpentError


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other trainings out of it while this one works. A kill leaves no lock behind.

    On systems and disks without locks nobody is kept out. Raises SerpentError if the folder cannot be made, or if
    another training works there, whose half-written checkpoint this one would take for the rest of a killed run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SerpentError(f"{folder}: cannot be made a folder ({error.strerror}); choose another out=") from None
    except ValueError:  # a character that neither file systems nor terminals take
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
        except OSError:  # a network disk may not support locks
            pass
        yield
    finally:
        os.close(held)
