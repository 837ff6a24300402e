"""What a run shows and leaves behind: lines or a bar, log.jsonl, TensorBoard, pictures and a plot.

Only in process 0.
"""

import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.image import Picture, to_pixels, write_image
from serpent_ir.system.whole_file import replace_file

Say = Callable[[str], None]

PICTURE = 256
"""Longest side in pixels of an image in a row of pictures. Of larger images the middle is shown."""


def say(line: str) -> None:
    """Print a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


class RunLog:
    """The log of a run in its folder, and the lines that it prints.

    Args:
        out: the run's folder.
        say: function that prints a line.
        first: whether this process is the one that reports; the others are silent.
        tensorboard: whether to write event files too.
        since: events of this step and later ones come from an interrupted run and are not to be shown.
    """

    def __init__(self, out: Path, say: Say, *, first: bool = True, tensorboard: bool = False, since: int = 0):
        self.out, self.log, self.first, self._say = out, out / "log.jsonl", first, say
        tensorboard = tensorboard and first
        self._writer = event_writer()(str(out / "tensorboard"), purge_step=since) if tensorboard else None
        self._bar: Any = None

    def cut(self, step: int, *, validated: bool = True) -> None:
        """Remove what was logged after a step, and a last row that was never finished.

        Unless `validated`, also remove the step's own validation, which will come again.
        """
        if not self.first:
            return
        rows = [row for row in read_rows(self.log) if row["step"] <= step]
        rows = [row for row in rows if validated or row["step"] < step or "psnr" not in row]
        replace_file(self.log, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        for row in [] if validated else [row for row in rows if row["step"] == step]:
            self._show(step, row)  # its events were removed together with those of the validation

    def showing(self, total: int, bar: bool) -> AbstractContextManager[object]:
        """Shows a bar during training, if `bar` is set and stderr is a terminal."""
        if not bar or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(16), MofNCompleteColumn(), TextColumn("{task.fields[now]}", markup=False))
        progress = Progress(*columns, console=Console(stderr=True, highlight=False, markup=False), transient=True)
        task = progress.add_task("", total=total, now="")
        self._bar = lambda **fields: progress.update(task, **fields)
        self._say = progress.console.print if self._say is say else self._say
        return progress

    def at(self, step: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar(completed=step)

    def row(self, step: int, told: str, row: dict[str, Any], *, now: str = "") -> None:
        """Append a row to the log and print `told`; or, if there is a bar and `now` is given, show `now` in the bar."""
        if not self.first:
            return
        line = json.dumps({"step": step, **{key: _finite(value) for key, value in row.items()}})
        try:
            with self.log.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise SerpentError(
                f"{self.log}: cannot be written ({error.strerror}); make room and go on with --resume"
            ) from None
        self._show(step, row)
        if now and self._bar:
            self._bar(now=now)
        else:
            self._say(told)

    def _show(self, step: int, row: dict[str, Any]) -> None:
        """In TensorBoard."""
        if self._writer:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def pictures(self, step: int, rows: Sequence[Sequence[Tensor]]) -> None:
        """Write degraded | restored | clean images (1, 3, H, W), one row each, as `pictures/step-NUMBER.png`."""
        if not rows or not self.first:
            return
        joined = [torch.cat([_middle(image) for image in row], -1) for row in rows]
        width = max(row.shape[-1] for row in joined)
        joined = [torch.nn.functional.pad(row, (0, width - row.shape[-1], 0, 0), value=1.0) for row in joined]
        sheet = torch.cat(joined, -2).nan_to_num()
        path = self.out / "pictures" / f"step-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            write_image(path, Picture(to_pixels(sheet, np.uint8)))
        except (OSError, ImageError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
            raise SerpentError(f"{path}: {reason}; make room and go on with --resume") from None
        if self._writer:
            self._writer.add_image("degraded, restored, clean", sheet[0].clamp(0, 1), step)

    def plot(self) -> None:
        """Draw the loss and PSNR of the whole run, and the PSNR of its input, as `run.png`."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator, NullLocator
        except ModuleNotFoundError:
            self._say("no plot of the run without matplotlib: pip install 'serpent-ir[train]'")
            return
        rows = read_rows(self.log)
        losses, scores = [r for r in rows if r.get("loss")], [r for r in rows if "psnr" in r]
        figure = Figure(figsize=(8, 7), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        upper.plot([r["step"] for r in losses], [r["loss"] for r in losses], lw=1)
        upper.set(ylabel="loss", yscale="log")
        upper.yaxis.set(major_locator=MaxNLocator(6), minor_locator=NullLocator())
        upper.yaxis.set_major_formatter("{x:.3g}")  # powers of ten would be typeset as formulas, which takes a second
        lower.plot([r["step"] for r in scores], [r["psnr"] for r in scores], marker=".", label="restored")
        if given := scores and scores[-1].get("input_psnr"):  # null if it is infinite
            lower.axhline(given, color="grey", ls="--", lw=1, label="input")
            lower.legend()
        lower.set(ylabel="validation PSNR (dB)", xlabel="step")
        for before, after in itertools.pairwise(losses):
            if before["stage"] != after["stage"]:
                upper.axvline(before["step"], color="grey", lw=0.5)
                lower.axvline(before["step"], color="grey", lw=0.5)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120)
        replace_file(self.out / "run.png", drawn.getvalue())

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def duration(seconds: float) -> str:
    """A duration in minutes or hours."""
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a log, without broken ones: a row that a kill cut short, or damaged bytes."""
    rows = []
    for line in log.read_bytes().split(b"\n") if log.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(_is_right(key, value) for key, value in row.items()) and "step" in row:
            rows.append(row)
    return rows


def _is_right(key: str, value: Any) -> bool:
    """Whether a row may hold this value: only numbers, or null for a number that was not finite."""
    if key == "step":
        return isinstance(value, int)
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


def event_writer() -> Any:
    """TensorBoard's class. Raises UsageError if TensorBoard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'serpent-ir[tensorboard]'") from None
    return SummaryWriter


def _middle(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    top, left = max(0, (height - PICTURE) // 2), max(0, (width - PICTURE) // 2)
    return image[..., top : top + PICTURE, left : left + PICTURE].float().cpu()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
