"""Image files in and out: what `serpent restore` and `serpent degrade` share."""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serpent_ir.cli.shell import progress_of, say
from serpent_ir.errors import SerpentError

if TYPE_CHECKING:
    from serpent_ir.files import Job
    from serpent_ir.image import Picture

_SILENCE = 10.0  # seconds that a person should have to wait without a word


def convert_files(
    inputs: Sequence[Path], output: Path, convert: "Callable[[Job, Picture], Picture]", done: str
) -> None:
    """Read, convert and write each image.

    A failure is reported, and the others are done. Then SerpentError is raised if there was one.
    """
    from serpent_ir.files import Outcome, find_jobs, run
    from serpent_ir.files.jobs import make_folders
    from serpent_ir.image import read_image, write_image
    from serpent_ir.system.file_state import FileState

    jobs = find_jobs(inputs, output)
    make_folders(jobs)
    states: dict[int, FileState | None] = {}

    def read(job: "Job") -> "Picture":
        if job.refused:
            raise SerpentError(job.refused)
        states[job.index] = FileState.of(job.source)
        return read_image(job.source)

    def write(job: "Job", picture: "Picture") -> None:
        if before := states.pop(job.index):
            before.check(job.source)
        write_image(job.target, picture)

    with watched(jobs, done, alone=len(jobs) == 1) as watch:

        def report(outcome: Outcome) -> None:
            watch.report(outcome.job, outcome.error, outcome.seconds)

        deque(run(jobs, read, convert, write, report), 0)
    watch.raise_if_failed()


@dataclass
class Watch:
    """What a person sees while many images are worked on, and the rows of those that are done.

    Attributes:
        rows: for each image, in order, its source, target, seconds and error ("", or why it failed).
    """

    jobs: "Sequence[Job]"
    done: str
    alone: bool
    progress: Callable[..., None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    _reached: float = 0.0
    _told: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self._places = {job.index: place for place, job in enumerate(self.jobs)}

    def report(self, job: "Job", error: str, seconds: float, details: str = "", **facts: Any) -> None:
        """Show that an image is done, or that it failed."""
        line = None
        if error and not self.alone:
            say(f"serpent: error: {error}")
        elif not error:
            line = f"{job.source} -> {job.target} ({seconds:.1f} s{details})"
        row = {"source": str(job.source), "target": str(job.target), "seconds": seconds, "error": error}
        self.rows.append(row | facts)
        self.progress(max(self._reached, len(self.rows)), len(self.jobs), line)

    def tell(self, job: "Job", part: int, parts: int, pages: int = 1) -> None:
        """Show that so many parts of an image are done. Without a bar that moves, a long wait gets a line now and then.

        Each of several pages has as many parts as the others.
        """
        self._reached = max(self._reached, self._places[job.index] + 0.99 * part / parts)  # it is not written yet
        line = None
        if part < parts and time.monotonic() - self._told > _SILENCE:
            of_page = f"page {part * pages // parts + 1} of {pages}"
            self._told = time.monotonic()
            line = f"{job.source}: {of_page if pages > 1 else f'{part} of {parts} tiles'}"
        self.progress(self._reached, len(self.jobs), line)

    def raise_if_failed(self) -> None:
        """Raise SerpentError if some images failed. For an only image it is that image's own error."""
        if self.alone and self.rows and self.rows[0]["error"]:
            raise SerpentError(self.rows[0]["error"])
        raise_if_failed(self.rows, self.done)


@contextmanager
def watched(jobs: "Sequence[Job]", done: str, *, alone: bool) -> Iterator[Watch]:
    """Report each image and its parts on stderr as they are done. The failure of one that is `alone` is said once."""
    with progress_of(done) as progress, terminated_like_interrupted():
        yield Watch(jobs, done, alone, progress)


def raise_if_failed(rows: Sequence[dict[str, Any]], done: str) -> None:
    """Raise SerpentError if some images failed."""
    if failed := sum(bool(row["error"]) for row in rows):
        raise SerpentError(f"{failed} of {len(rows)} images failed; {len(rows) - failed} {done}")


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, which batch systems and `torchrun` send, end the work as Ctrl-C does: with whole files only."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
