"""Files that are there as a whole or not at all: the one place where they are made."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, aside: str = "") -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` once it is on the disk; after an error `path` is as it was.

    A symbolic link of that name is replaced, not followed. Raises OSError where the system does not let it.

    Args:
        path: what it is to be.
        aside: the name that it has until then, in the same folder. A kill leaves it behind, so for what is large this
            should be a name that the next call takes again; by default it is one that nobody else has.
    """
    temporary = path.with_name(aside or f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb" if aside else "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
