"""Image files in and out: what `serpent restore` and `serpent degrade` share."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serpent_ir.cli.shell import progress_of, say
from serpent_ir.errors import SerpentError

if TYPE_CHECKING:
    from serpent_ir.files import Job, Outcome
    from serpent_ir.image import Picture

R = TypeVar("R")
W = TypeVar("W")
Parts = Callable[[int, int], None]
_SILENCE = 10.0  # seconds without a word that a person should have to bear


def plan_files(inputs: Sequence[Path], output: Path) -> "list[Job]":
    """As `serpent_ir.files.plan.plan`."""
    from serpent_ir.files import plan

    return plan(inputs, output)


def convert_files(jobs: "Sequence[Job]", convert: "Callable[[int, Picture], Picture]", done: str) -> None:
    """Read, convert and write each image; a failure is reported, the others are done, and SerpentError ends it."""
    from serpent_ir.image import read_image, write_image
    from serpent_ir.system.file_state import FileState

    states: dict[int, FileState | None] = {}

    def read(job: "Job") -> "Picture":
        states[job.index] = FileState.of(job.source)
        return read_image(job.source)

    def write(job: "Job", picture: "Picture") -> None:
        if before := states.pop(job.index):
            before.check(job.source)
        write_image(job.target, picture)

    rows = run_files(jobs, read, lambda job, picture, tell: convert(job.index, picture), write, done)
    raise_if_failed(rows, done)


def run_files(
    jobs: "Sequence[Job]",
    read: "Callable[[Job], R]",
    work: "Callable[[Job, R, Parts], W]",
    write: "Callable[[Job, W], None]",
    done: str,
    describe: "Callable[[Job], str]" = lambda job: "",
    *,
    raises: bool = True,
) -> list[dict[str, Any]]:
    """Run `serpent_ir.files.pipeline.run`; each image is reported on stderr as it is done, with what `describe` adds.

    `work` tells of the parts of an image by its last argument, a function of (parts done, parts in all): a bar moves by
    them, and without one a long wait gets a line now and then.

    Returns source, target, seconds and error ("" or why it failed) of each. With `raises` the failure of an only job is
    raised as SerpentError, except where other processes do other jobs.
    """
    from serpent_ir.files import run
    from serpent_ir.system.processes import rank_and_world

    for folder in {job.target.parent: None for job in jobs if not job.refused}:
        _make_folder(folder)  # before any work, or each file would fail for this one reason

    def read_if_allowed(job: "Job") -> R:
        if job.refused:
            raise SerpentError(job.refused)
        return read(job)

    places = {job.index: place for place, job in enumerate(jobs)}
    reached, told = 0.0, time.monotonic()
    rows, alone = [], raises and len(jobs) == rank_and_world()[1] == 1
    with progress_of(done) as progress, terminated_like_interrupted():

        def report(outcome: "Outcome") -> None:
            job, line = outcome.job, None
            if outcome.error and not alone:
                say(f"serpent: error: {outcome.error}")
            elif not outcome.error:
                line = f"{job.source} -> {job.target} ({outcome.seconds:.1f} s{describe(job)})"
            row = {"source": str(job.source), "target": str(job.target), "seconds": outcome.seconds}
            rows.append({**row, "error": outcome.error})
            progress(max(reached, len(rows)), len(jobs), line)

        def work_and_tell(job: "Job", given: R) -> W:
            def tell(part: int, parts: int) -> None:
                nonlocal reached, told
                reached = max(reached, places[job.index] + 0.99 * part / parts)  # it is not written yet
                line = None
                if part < parts and time.monotonic() - told > _SILENCE:
                    told, line = time.monotonic(), f"{job.source}: {part} of {parts} tiles"
                progress(reached, len(jobs), line)

            return work(job, given, tell)

        run(jobs, read_if_allowed, work_and_tell, write, report)
    if alone and rows[0]["error"]:
        raise SerpentError(rows[0]["error"])
    return rows


def raise_if_failed(rows: Sequence[dict[str, Any]], done: str) -> None:
    """Raise SerpentError where some images failed."""
    if failed := sum(bool(row["error"]) for row in rows):
        raise SerpentError(f"{failed} of {len(rows)} images failed; {len(rows) - failed} {done}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SerpentError(f"{folder}: no folder can be made there ({error.strerror}); choose another -o") from None


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, as batch systems and `torchrun` send it, ends the work as Ctrl-C does: with whole files only."""
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
