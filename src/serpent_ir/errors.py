"""Errors for people: one line that names the file or option and the remedy. The command line prints them."""

import errno
import sys


class SerpentError(Exception):
    """Anything the user can mend. Exit status 1: the work failed."""


class UsageError(SerpentError, ValueError):
    """A wrong name, option or configuration key. Exit status 2."""


class ImageError(SerpentError):
    """A file that cannot be read or written as an image."""


class SourceChangedError(ImageError):
    """A file that became another one between its reading and the writing of what was made of it."""


OUT_OF_MEMORY = "out of memory"
"""What stands for a figure where memory did not suffice, in profiles and tables."""


class OutOfRoomError(SerpentError):
    """Memory that does not suffice for a training."""


# What is said where memory ends, in any case of letters: by PyTorch's allocators of the CPU and of MPS, NVIDIA's
# libraries, C++, oneDNN, OpenCV, the system's loader of libraries, and Python where the system has no thread to give;
# and by PyTorch of a size that no number holds.
_MEMORY_SIGNS = (
    "not enough memory", "insufficient memory", "failed to allocate", "allocate memory", "out of memory",
    "status_alloc_failed", "storage size calculation overflowed", "bad_alloc", "bad allocation", "unable to mmap",
    "failed to map segment", "could not create a primitive", "could not create a memory", "start new thread",
    "resource temporarily unavailable",
)  # fmt: skip
_SAID_BY = (RuntimeError, ImportError, OSError, SystemError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the ways in which Python, PyTorch and other libraries run out of memory."""
    torch = sys.modules.get("torch")  # the error may be that it does not load
    kinds = (MemoryError, *filter(None, [getattr(torch, "OutOfMemoryError", None)]))
    if isinstance(error, kinds) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, (SerpentError, BlockingIOError)):  # it was told what it is; there is nothing to read yet
        return False
    said = str(error).lower()
    by_library = isinstance(error, _SAID_BY) or type(error).__module__ == "cv2"
    if by_library and any(sign in said for sign in _MEMORY_SIGNS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def memory_line(error: BaseException) -> str:
    """One line for an error of which `is_out_of_memory` is true and nobody has said more."""
    lines = str(error).splitlines() or [type(error).__name__]
    named = next((line for line in lines if any(sign in line.lower() for sign in _MEMORY_SIGNS)), lines[0])
    reason = named.partition(". ")[0].strip()[:120].rstrip(".") or type(error).__name__
    return (
        f"not enough memory ({reason}); close what else uses it, raise the limit (ulimit -v, a container's, the batch "
        "system's), or take smaller images, --tile 256 where there is that option, or OMP_NUM_THREADS=1"
    )
