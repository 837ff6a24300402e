"""Restores many image files: what `serpent restore` does, for programs."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.files.compare import write_comparison
from serpent_ir.files.jobs import Job, check_sheets, companion, find_jobs, make_folders, sheet_of
from serpent_ir.files.manifest import Manifest
from serpent_ir.files.pipeline import Outcome, Together, run
from serpent_ir.files.source import Restored, Source
from serpent_ir.inference import Restorer, pick_device
from serpent_ir.inference.network import check_task, device_of
from serpent_ir.models import DEFAULT_WEIGHTS, create_model, load_model, preset_of
from serpent_ir.system.processes import local_world, own_device, rank_and_world

SMALL = 1 << 19
"""Images of up to so many pixels go through the network of a GPU together with others of their size."""
TOGETHER, MOST = 1 << 21, 32
"""The most pixels, and the most images, of such a pass."""
AHEAD = 1 << 23
"""Pixels of images that may be read ahead, and that may wait to be written, beyond one for each thread."""


@dataclass(frozen=True)
class RestoredFile:
    """What became of an image.

    Attributes:
        job: the image and its output.
        status: "restored"; "skipped", for an image whose output was there before; or "failed".
        error: one line that says why it failed, or "". A skipped image has one if its comparison was missing and could
            not be drawn.
        seconds: how long reading, restoring and writing took.
        width, height: of the image, in pixels; 0 if it was not restored.
        pages: how many pages of it were restored.
        tiles: how many tiles it was cut into; 1 for a whole image. Of several pages, the page with most counts.
        figures: with a reference: input_psnr, psnr (dB), input_ssim and ssim.
        sheet: the comparison that was drawn for a skipped image, or None.
        left: the share of the image, from 0 to 1, that `auto` left as it was; None without `auto`.
    """

    job: Job
    status: Literal["restored", "skipped", "failed"]
    error: str = ""
    seconds: float = 0.0
    width: int = 0
    height: int = 0
    pages: int = 1
    tiles: int = 1
    figures: Mapping[str, float] = field(default_factory=dict)
    sheet: Path | None = None
    left: float | None = None


def restore_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    model: str | nn.Module | None = None,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    tile: str | int = "auto",
    tile_overlap: int = 32,
    pages: str = "first",
    skip_existing: bool = False,
    manifest: str | Path | None = None,
    mask: str | Path | None = None,
    strength: float = 1.0,
    auto: bool | None = None,
    protect: str | Path | None = None,
    compare: bool = False,
    reference: str | Path | None = None,
    progress: Callable[[Job, int, int], None] | None = None,
    report: Callable[[RestoredFile], None] | None = None,
) -> "Restoration":
    """Restore image files and folders of them into a folder, or one file into one file.

    Everything that can be wrong with the call is checked at once. Images are restored in the caller's thread as the
    result is iterated over, while the next one is read and the last one written. A file that fails does not stop the
    others. Whoever stops iterating loses nothing: what is being written is finished. Each of several processes that
    `torchrun` started does its share.

    Args:
        inputs: image files, folders, patterns, `@LIST` or `-`, as `serpent_ir.files.find_jobs` takes them.
        output: a folder; or, for one image, an image file.
        model: weights that ship (default `serpent_l.photo`), the network that `weights` are for, or a network.
        weights: a file as `serpent_ir.load_model` takes it. Without `model` the file says which network it is for.
        device: as `serpent_ir.inference.pick_device` takes it. "auto" leaves a network where it is; under `torchrun` it
            is a GPU for each process.
        precision: as for `serpent_ir.restore`.
        tile: the same.
        tile_overlap: the same.
        pages: "first"; or "all", with which each page of a TIFF becomes a page of a TIFF of the same kind.
        skip_existing: leave out images whose output is there, whatever made it.
        manifest: leave out images that this file names as done with these settings, and record there what gets done.
        mask: for weights of `inpaint`: an image whose light pixels are missing, or a folder of such images that are
            named as the outputs.
        strength: as for `serpent_ir.restore`.
        auto: the same.
        protect: an image whose light pixels stay as they are, or a folder of them named as the outputs.
        compare: also draw a sheet of before and after beside each output.
        reference: what the outputs should look like, as an image or such a folder. It is measured and drawn.
        progress: called with an image, how many parts of it are restored, and how many parts it has.
        report: called with what became of an image as soon as that is known. That is before it is yielded, and perhaps
            in another thread.

    Returns:
        An iterator over `RestoredFile`s: first the skipped images, then the others in the order of `find_jobs`.

    Raises:
        UsageError: for what `find_jobs` refuses, or for an unknown name, device, tile, precision or option.
        SerpentError: for weights that cannot be read; or, at the end of the iteration, for a manifest that cannot be
            written.
    """
    rank, world = rank_and_world()
    output, weights = Path(output), _path(weights)
    mask, protect, reference, manifest = _path(mask), _path(protect), _path(reference), _path(manifest)
    if reference and not compare:
        raise UsageError("--reference is for --compare; give both")
    if pages not in ("first", "all"):
        raise UsageError(f"--pages {pages}: use first or all")
    if compare and pages == "all":
        raise UsageError("--compare shows the first page; use it without --pages all")
    jobs = find_jobs([Path(path) for path in inputs], output)
    if compare:
        check_sheets(jobs)
    version = _version(weights)  # before they are read, as the manifest's other facts
    network, name = _network(model, weights)
    if isinstance(model, nn.Module):
        version = _digest(model) if manifest else None
    check_task(network, weights)
    stays = device == "auto" and isinstance(model, nn.Module)
    place = device_of(network) if stays else pick_device(own_device(device))
    jobs = jobs[rank::world]
    network = network if stays else network.to(place)
    restorer = Restorer(
        network, tile=tile, tile_overlap=tile_overlap, precision=precision, strength=strength, auto=auto
    )
    _check_companions(restorer, mask, protect, reference)
    settings: dict[str, Any] = {"model": name, "weights": version, "tile": str(tile), "overlap": tile_overlap}
    settings |= {"mask": str(mask.absolute())} if mask else {}
    settings |= {"pages": pages} if pages != "first" else {}
    settings["precision"] = precision
    settings |= {"strength": strength} if strength != 1 else {}
    settings |= {"auto": True} if restorer.auto else {}
    settings |= {"protect": str(protect.absolute())} if protect else {}

    def masks_of(job: Job) -> tuple[Path | None, Path | None]:
        return companion(mask, job, output, "mask"), companion(protect, job, output, "mask")

    def draw(job: Job) -> dict[str, float]:
        return write_comparison(job.source, job.target, sheet_of(job), companion(reference, job, output, "reference"))

    record = Manifest(manifest, settings, masks_of) if manifest else None
    return Restoration(
        jobs,
        restorer,
        record,
        skip_existing,
        masks_of,
        draw if compare else None,
        pages,
        progress,
        report,
        alone=restorer.takes_mask or protect is not None,
    )


class Restoration(Iterator[RestoredFile]):
    """A call of `restore_files` that is under way.

    Attributes:
        skipped: the images of this process's share that were done before, in order.
        todo: the other images of its share.
        pages: how many pages of an image are restored, by the index of its job, for each image that was begun.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        restorer: Restorer,
        record: Manifest | None,
        skip_existing: bool,
        masks_of: Callable[[Job], tuple[Path | None, Path | None]],
        draw: Callable[[Job], dict[str, float]] | None,
        pages: str,
        progress: Callable[[Job, int, int], None] | None,
        report: Callable[[RestoredFile], None] | None,
        *,
        alone: bool,
    ):
        self._restorer, self._record = restorer, record
        there = [(skip_existing and job.target.exists()) or bool(record and record.has(job)) for job in jobs]
        self.skipped = [job for job, done in zip(jobs, there, strict=True) if done]
        self.todo = [job for job, done in zip(jobs, there, strict=True) if not done]
        self._masks_of, self._draw, self._pages = masks_of, draw, pages
        self._progress, self._report = progress, report
        self._alone = alone  # each image has a mask of its own, so that none go through the network together
        self._facts: dict[int, dict[str, Any]] = {}
        self.pages: dict[int, int] = {}
        self._results = self._restore()

    def __next__(self) -> RestoredFile:
        return next(self._results)

    def close(self) -> None:
        """End the work. What is being written is finished, and nothing else is begun."""
        self._results.close()

    def _restore(self) -> Generator[RestoredFile]:
        with closing(self._record) if self._record else nullcontext():
            for job in self.skipped:
                yield self._told(self._done_before(job))
            make_folders(self.todo)  # before any work, or each file would fail for this one reason
            told: deque[RestoredFile] = deque()

            def report(outcome: Outcome) -> None:
                told.append(self._result(outcome))

            threads = _threads(device_of(self._restorer.model))
            for _ in run(
                self.todo, self._read, self._work, self._write, report,
                readers=threads, writers=threads, weight=lambda source: source.read_pixels / AHEAD,
                together=Together(self._kind, self._work_together) if threads > 1 else None,
            ):  # fmt: skip
                yield told.popleft()
            if self._record:
                self._record.finish()

    def _done_before(self, job: Job) -> RestoredFile:
        """An image that is done; its comparison is drawn where a stop came between."""
        if not self._draw or job.refused or (sheet := sheet_of(job)).exists():
            return RestoredFile(job, "skipped")
        start = time.perf_counter()
        try:
            figures = self._draw(job)
        except SerpentError as error:
            return RestoredFile(job, "skipped", str(error))
        return RestoredFile(job, "skipped", "", time.perf_counter() - start, figures=figures, sheet=sheet)

    def _read(self, job: Job) -> Source:
        if job.refused:
            raise SerpentError(job.refused)
        if self._record:
            self._record.begin(job)
        return Source(job.source).load(self._pages)

    def _work(self, job: Job, source: Source) -> Restored:
        tiles = 1

        def count(done: int, total: int) -> None:
            nonlocal tiles
            self.pages[job.index] = source.pages
            tiles = max(tiles, total // source.pages)
            if self._progress:
                self._progress(job, done, total)

        restored = source.restore(self._restorer, job.target, count, *self._masks_of(job), pages=self._pages)
        self._facts[job.index] = {"width": restored.width, "height": restored.height, "left": restored.left}
        self._facts[job.index] |= {"pages": source.pages, "tiles": tiles}
        return restored

    def _kind(self, source: Source) -> tuple[Hashable, int] | None:
        pixels = source.read_pixels
        if not 0 < pixels <= SMALL or source.kind is None or self._alone:
            return None
        return source.kind, min(MOST, TOGETHER // pixels)

    def _work_together(self, jobs: list[Job], sources: list[Source]) -> list[Restored]:
        made = Source.restore_together(sources, [job.target for job in jobs], self._restorer)
        for job, restored in zip(jobs, made, strict=True):
            self.pages[job.index] = 1
            self._facts[job.index] = {"width": restored.width, "height": restored.height, "left": restored.left}
            if self._progress:
                self._progress(job, 1, 1)
        return made

    def _write(self, job: Job, restored: Restored) -> None:
        restored.write()
        if self._draw:
            self._facts[job.index]["figures"] = self._draw(job)
        if self._record:
            self._record.add(job)

    def _result(self, outcome: Outcome) -> RestoredFile:
        facts = self._facts.pop(outcome.job.index, {})
        status = "failed" if outcome.error else "restored"
        return self._told(RestoredFile(outcome.job, status, outcome.error, outcome.seconds, **facts))

    def _told(self, result: RestoredFile) -> RestoredFile:
        if self._report:
            self._report(result)
        return result


def _threads(device: torch.device) -> int:
    """How many threads read, and how many write. Beside a network on the CPU it is one: more would take its cores."""
    return 1 if device.type == "cpu" else max(1, min(4, (os.cpu_count() or 1) // local_world() // 4))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _network(model: str | nn.Module | None, weights: Path | None) -> tuple[nn.Module, str]:
    """The network, and its name in a manifest."""
    if isinstance(model, nn.Module):
        if weights:
            raise UsageError("weights are for a network that is named; load them into this one before")
        return model, type(model).__name__
    if weights and model is None:
        network = load_model(weights)
        return network, preset_of(network.config) or type(network).__name__
    name = model or DEFAULT_WEIGHTS
    return create_model(name, pretrained=weights is None, checkpoint_path=weights), name


def _digest(model: nn.Module) -> str:
    """A hash that tells one network from another in a manifest where no file or name does."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_companions(restorer: Restorer, mask: Path | None, protect: Path | None, reference: Path | None) -> None:
    """Raise UsageError for what every image would fail of, some of them only after their restoration."""
    for path in filter(None, (mask, protect, reference)):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
    if mask and not restorer.takes_mask:
        raise UsageError("--mask is for weights of inpaint; these take none")
    if restorer.takes_mask and not mask:
        raise UsageError("weights of inpaint need --mask, an image that is white where pixels are missing")


def _version(weights: Path | None) -> list[Any] | None:
    """What tells a weights file from another of the same name."""
    if weights is None or not weights.exists():
        return None
    status = weights.stat()
    return [str(weights.absolute()), status.st_size, status.st_mtime_ns]
