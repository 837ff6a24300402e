"""Tells whether a file is still the one that was read: a photo may be saved again while its old version is at work."""

from pathlib import Path
from typing import NamedTuple

from serpent_ir.errors import SourceChangedError


class FileState(NamedTuple):
    """What distinguishes a file from another one of the same name, or from a later version of itself."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState | None":
        """The state of a file now; None if there is none. Take it before the file is opened."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Raise SourceChangedError unless the file is as it was. Otherwise what was read may mix two versions."""
        if FileState.of(path) != self:
            raise SourceChangedError(
                f"{path}: changed after it was read; nothing was written for it: run the same command again"
            )
