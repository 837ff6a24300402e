"""Errors for people: one line that names the file or option and the remedy. The command line prints them."""


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
