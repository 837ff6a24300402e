"""Records what part of a batch is done, in a file that survives whatever stops the batch."""

import glob
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.system.processes import rank_and_world

if TYPE_CHECKING:
    from serpent_ir.files.jobs import Job

_BEGINNING = b'{"source": "'
"""The beginning of every line."""


class Manifest:
    """A file with a line for each finished image, so that an interrupted batch continues where it stopped.

    An image counts as done if its line names the same settings and the same size and time of the source, and its output
    exists. Size and time are those from before the source was read. Lines that a full disk, a stop or a power cut left
    incomplete or damaged are ignored; the others still count. Processes that share a batch write one file each and read
    the files of all.

    Args:
        path: the file. A file that is no manifest is refused by UsageError and left as it is.
        settings: what the outputs depend on besides the sources.
        beside: gives other files that the output of a job depends on (its masks), or None; sizes and times count too.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], beside: "Callable[[Job], Sequence[Path | None]]" = lambda job: ()
    ):
        self._settings, self._beside = settings, beside
        rank, world = rank_and_world()
        self._done: dict[str, dict[str, Any]] = {}
        self._begun: dict[int, dict[str, Any]] = {}
        self._waiting: list[bytes] = []  # lines that did not fit on the disk
        for file in [path, *sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*"))]:
            self._read(file)
        self.path = path = path if world == 1 else path.with_name(f"{path.name}.rank{rank}")
        try:
            self._file = path.open("a+b", buffering=0)  # unbuffered: a line is written at once, or the failure is seen
            end = self._file.seek(0, 2)
            self._file.seek(max(0, end - 1))
            self._torn = self._file.read(1) not in (b"", b"\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot be written as a manifest ({error.strerror})") from None

    def _read(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"{file}: cannot be read as a manifest ({error.strerror})") from None
        ours = not content.strip(b"\0\r\n")  # a power cut may leave zero bytes in place of what was to be written
        for line in content.split(b"\n"):
            record = _parsed(line)
            if isinstance(record, dict) and _is_record(record):
                self._done[record["target"]] = record
                ours = True
            elif record is None:
                ours = ours or _was_a_record(line)
        if not ours:
            raise UsageError(f"{file}: is no manifest of serpent restore; name another file")

    def has(self, job: "Job") -> bool:
        """Whether this image is done."""
        return job.target.is_file() and self._done.get(_absolute(job.target)) == self._record(job)

    def begin(self, job: "Job") -> None:
        """Take the size and time of a source before it is read. `add` will record them."""
        self._begun[job.index] = self._record(job)

    def add(self, job: "Job") -> None:
        """Record that this image is done. If the disk is full the line waits for room, and one warning is given."""
        record = self._begun.pop(job.index, None) or self._record(job)
        self._waiting.append(json.dumps(record).encode() + b"\n")
        told = len(self._waiting) > 1
        if (problem := self._write()) and not told:
            warnings.warn(f"{self.path}: cannot be written ({problem}); what is done is not noted there", stacklevel=2)

    def finish(self) -> None:
        """Write the lines that wait for room. Raises SerpentError if there is still none."""
        if problem := self._write():
            count = len(self._waiting)
            raise SerpentError(
                f"{self.path}: cannot be written ({problem}); {count} {'images' if count > 1 else 'image'} that "
                f"{'are' if count > 1 else 'is'} done {'are' if count > 1 else 'is'} not noted there; make room and "
                "call again"
            )

    def close(self) -> None:
        self._file.close()

    def _write(self) -> str:
        """Write all waiting lines. Returns the reason why that is impossible, "" if it was done."""
        while self._waiting:
            line = (b"\n" if self._torn else b"") + self._waiting[0]
            try:
                written = self._file.write(line)
                if written != len(line):  # the disk became full within this line; writing the rest will give the error
                    self._torn = True
                    self._file.write(line[written:])
                    self._torn = False
            except OSError as error:
                return error.strerror or str(error)
            self._torn = False
            self._waiting.pop(0)
        return ""

    def _record(self, job: "Job") -> dict[str, Any]:
        status = job.source.stat()
        names = {"source": _absolute(job.source), "target": _absolute(job.target)}
        record = {**names, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **self._settings}
        try:
            beside = [(path, path.stat()) for path in self._beside(job) if path is not None]
            if beside:
                facts = [(_absolute(path), status.st_size, status.st_mtime_ns) for path, status in beside]
                record["beside"] = [fact for each in facts for fact in each]
        except (SerpentError, OSError):  # the job will fail, and report it, when it is worked on
            pass
        return record


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_record(record: dict[str, Any]) -> bool:
    kinds = {"source": str, "target": str, "bytes": int, "mtime_ns": int}
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _was_a_record(line: bytes) -> bool:
    """Whether a line that is not JSON looks like one of ours, cut short or damaged."""
    line = line.strip(b"\0\r")
    begins = bool(line) and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line))
    return begins or (b'"target": "' in line and b'"mtime_ns": ' in line)


def _absolute(path: Path) -> str:
    return str(path.absolute())
