"""Whether a file is still the one that was read: somebody may save a photo anew while its old version is at work."""

from pathlib import Path
from typing import NamedTuple

from serpent_ir.errors import SourceChangedError


class FileState(NamedTuple):
    """What tells a file from another, or from a later version of itself, that has its name."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState | None":
        """That of a file now, to be taken before it is opened; None where there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Raise SourceChangedError unless the file is as it was: what was read may be a half of each version."""
        if FileState.of(path) != self:
            raise SourceChangedError(
                f"{path}: changed after it was read; nothing was written for it: run the same command again"
            )
