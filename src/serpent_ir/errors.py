"""Errors for people: one line that names the file or option and the remedy. The command line prints that line."""

import errno
import sys


class SerpentError(Exception):
    """Anything that the user can mend. Exit status 1: the work failed."""


class UsageError(SerpentError, ValueError):
    """A wrong name, option or configuration key. Exit status 2."""


class ImageError(SerpentError):
    """A file that cannot be read or written as an image."""


class SourceChangedError(ImageError):
    """A file that was replaced or changed between the moment it was read and the writing of its result."""


OUT_OF_MEMORY = "out of memory"
"""What profiles and tables hold in place of a figure if memory did not suffice."""


class OutOfRoomError(SerpentError):
    """Memory does not suffice for a training."""


# What libraries say, in any letter case, if memory runs out: PyTorch's allocators of the CPU and of MPS, NVIDIA's
# libraries, C++, oneDNN, OpenCV, the system's library loader, and Python if the system cannot start a thread. Also what
# PyTorch says of a size that exceeds its numbers.
_MEMORY_SIGNS = (
    "not enough memory", "insufficient memory", "failed to allocate", "allocate memory", "out of memory",
    "status_alloc_failed", "storage size calculation overflowed", "bad_alloc", "bad allocation", "unable to mmap",
    "failed to map segment", "could not create a primitive", "could not create a memory", "start new thread",
    "resource temporarily unavailable",
)  # fmt: skip
_SAID_BY = (RuntimeError, ImportError, OSError, SystemError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the ways in which Python, PyTorch and other libraries report that memory ran out."""
    torch = sys.modules.get("torch")  # not imported here, since the error may be that torch cannot be loaded
    kinds = (MemoryError, *filter(None, [getattr(torch, "OutOfMemoryError", None)]))
    if isinstance(error, kinds) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, (SerpentError, BlockingIOError)):  # it already says what it is; BlockingIOError: no data yet
        return False
    said = str(error).lower()
    by_library = isinstance(error, _SAID_BY) or type(error).__module__ == "cv2"
    if by_library and any(sign in said for sign in _MEMORY_SIGNS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def memory_line(error: BaseException) -> str:
    """One line for an error for which `is_out_of_memory` is true and nobody has said more."""
    lines = str(error).splitlines() or [type(error).__name__]
    named = next((line for line in lines if any(sign in line.lower() for sign in _MEMORY_SIGNS)), lines[0])
    reason = named.partition(". ")[0].strip()[:120].rstrip(".") or type(error).__name__
    return (
        f"not enough memory ({reason}); close other programs, raise the limit (ulimit -v, the container's, the batch "
        "system's), or use smaller images, --tile 256 if there is that option, or OMP_NUM_THREADS=1"
    )
