"""serpent restore."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serpent_ir.cli.files import plan_files, raise_if_failed, run_files
from serpent_ir.cli.shell import Device, Inputs, Json, Name, Output, Weights, finite, model_name, say, shell_command
from serpent_ir.errors import SerpentError, UsageError

if TYPE_CHECKING:
    from serpent_ir.cli.files import Parts
    from serpent_ir.files import Job, Manifest, Source
    from serpent_ir.files.source import Restored
    from serpent_ir.inference import Restorer


@shell_command("Restore images. Outputs keep size (with sr8, 8 times that), depth, format and metadata.")
def restore(
    inputs: Inputs,
    output: Output,
    name: Name = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto (bfloat16 on CUDA), float32 or bfloat16.")] = "auto",
    tile: Annotated[str, typer.Option(help="auto (only if memory is short), none, or pixels a side.")] = "auto",
    tile_overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbouring tiles share.")] = 32,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave out what has an output.")] = False,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Note there what is done, and leave that out: goes on after a stop."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="For inpaint: an image, white where pixels are missing; or a folder."),
    ] = None,
    pages: Annotated[
        str, typer.Option(metavar="first|all", help="Of a TIFF of several pages: the first, or all into one file.")
    ] = "first",
    compare: Annotated[bool, typer.Option("--compare", help="Also write NAME-compare.png: before and after.")] = False,
    reference: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --compare: the true image, to measure; or a folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore image files and folders of them into a folder, or one file into one file.

    A file that fails is reported on stderr, the others are done; at the end a line sums up. Of several processes with
    RANK and WORLD_SIZE set, as `torchrun` sets them, each does its share, and the first tells the sum.

    Args:
        inputs: as `serpent_ir.files.plan.plan` takes them.
        output: the same.
        name: weights that ship (default `serpent_l.photo`), or the network that `weights` are for.
        weights: a file as `load_model` takes it; without `name`, the network is the one that it is for.
        device: as `serpent_ir.inference.pick_device` takes it; under `torchrun` "auto" is a GPU for each process.
        precision: as for `serpent_ir.restore`.
        tile: the same.
        tile_overlap: the same.
        skip_existing: leave out images whose output is there, whatever made it.
        manifest: leave out images that this file names as done with these settings, and note there what gets done.
        mask: an image whose light pixels are missing, or a folder that mirrors the output's; for weights of `inpaint`.
        pages: "first", or "all": each page of a TIFF becomes one of a TIFF of the same kind.
        compare: also write what `serpent_ir.files.compare` draws, beside each output.
        reference: what the output should look like, as an image or a folder like that of masks; measured and drawn.
        as_json: print restored, failed and skipped (counts), megapixels (of the inputs), seconds,
            megapixels_per_second, and `images`: source, target, seconds, error, width, height, tiles of each,
            and with a reference input_psnr, psnr, input_ssim, ssim.

    Raises:
        UsageError: before any work, for what `plan` refuses, or an unknown name, device, tile or precision.
        SerpentError: at the end, where files failed.
    """
    from serpent_ir.files import Manifest
    from serpent_ir.files.compare import write_comparison
    from serpent_ir.files.plan import check_sheets, companion, sheet_of
    from serpent_ir.inference import Restorer, pick_device
    from serpent_ir.inference.network import check_task
    from serpent_ir.models import create_model, load_model, preset_of
    from serpent_ir.system.processes import gather, own_device, rank_and_world

    rank, world = rank_and_world()
    if reference and not compare:
        raise UsageError("--reference is for --compare; give both")
    if pages not in ("first", "all"):
        raise UsageError(f"--pages {pages}: use first or all")
    if compare and pages == "all":
        raise UsageError("--compare shows the first page; use it without --pages all")
    planned = plan_files(inputs, output)
    if compare:
        check_sheets(planned)
    jobs = planned[rank::world]
    version = _version(weights)  # before they are read, as the manifest's other facts
    if weights and name is None:
        model = load_model(weights)
        name = preset_of(model.config) or type(model).__name__
    else:
        name = model_name(name, weights)
        model = create_model(name, pretrained=weights is None, checkpoint_path=weights)
    check_task(model, weights)
    restorer = Restorer(
        model.to(pick_device(own_device(device))),
        tile=int(tile) if tile.isdecimal() else tile,
        tile_overlap=tile_overlap,
        precision=precision,
    )
    _check_companions(restorer, mask, reference)
    settings = {"model": name, "weights": version, "tile": tile, "overlap": tile_overlap}
    settings |= {"mask": str(mask.absolute())} if mask else {}
    settings |= {"pages": pages} if pages != "first" else {}

    def mask_of(job: "Job") -> Path | None:
        return companion(mask, job, output, "mask")

    with ExitStack() as stack:
        record = None
        if manifest:
            record = Manifest(manifest, {**settings, "precision": precision}, mask_of)
            stack.enter_context(closing(record))

        def comparison(job: "Job") -> dict[str, float]:
            return write_comparison(
                job.source, job.target, sheet_of(job), companion(reference, job, output, "reference")
            )

        beside = (mask_of, comparison if compare else None)
        own = _restore(jobs, restorer, record, skip_existing, *beside, pages, raises=not as_json)
    everybody = gather(own)
    if rank == 0 or len(everybody) < world:  # where nobody told the first, each tells of its share
        _sum_up(everybody, as_json)


def _restore(
    jobs: "Sequence[Job]",
    restorer: "Restorer",
    record: "Manifest | None",
    skip_existing: bool,
    mask_of: "Callable[[Job], Path | None]",
    compare: "Callable[[Job], dict[str, float]] | None",
    pages: str,
    *,
    raises: bool,
) -> dict[str, Any]:
    """Do the share of this process.

    Returns `rows` as `run_files` gives them with width, height and tiles; `problems`, lines on what failed besides;
    skipped and seconds.
    """
    from serpent_ir.files import Source

    skipped = [job for job in jobs if (skip_existing and job.target.exists()) or (record and record.has(job))]
    kept = {job.index for job in skipped}
    todo = [job for job in jobs if job.index not in kept]
    facts: dict[str, dict[str, Any]] = {}

    def read(job: "Job") -> "Source":
        if record:
            record.begin(job)
        source = Source(job.source)
        return source.load() if pages == "first" else source.load(pages)

    def work(job: "Job", source: "Source", tell: "Parts") -> "Restored":
        tiles = 1

        def count(done: int, total: int) -> None:
            nonlocal tiles
            tiles = total
            tell(done, total)

        restored = source.restore(restorer, job.target, count, mask_of(job), pages=pages)
        facts[str(job.source)] = {"width": restored.width, "height": restored.height, "tiles": tiles}
        return restored

    def write(job: "Job", restored: "Restored") -> None:
        restored.write()
        if compare:
            facts[str(job.source)] |= compare(job)
        if record:
            record.add(job)

    def details_of(job: "Job") -> str:
        fact = facts[str(job.source)]
        told = f", {fact['tiles']} tiles" if fact["tiles"] > 1 else ""
        return f"{told}, PSNR {fact['input_psnr']:.2f} -> {fact['psnr']:.2f} dB" if "psnr" in fact else told

    start = time.perf_counter()
    problems = _draw_lost_sheets(skipped, compare) if compare else []
    rows = run_files(todo, read, work, write, "restored", details_of, raises=raises)
    rows = [{**row, **facts.get(row["source"], {})} for row in rows]
    if record:
        try:
            record.finish()
        except SerpentError as error:
            problems.append(str(error))
    return {"rows": rows, "problems": problems, "skipped": len(skipped), "seconds": time.perf_counter() - start}


def _draw_lost_sheets(jobs: "Sequence[Job]", compare: "Callable[[Job], dict[str, float]]") -> list[str]:
    """Draw the comparisons that are missing of images that are done: a stop came between. Returns what failed."""
    from serpent_ir.files.plan import sheet_of

    problems = []
    for job in jobs:
        if job.refused or (sheet := sheet_of(job)).exists():
            continue
        try:
            compare(job)
            say(f"{job.target} -> {sheet} (drawn)")
        except SerpentError as error:
            problems.append(str(error))
    return problems


def _check_companions(restorer: "Restorer", mask: Path | None, reference: Path | None) -> None:
    """Raise UsageError where every image would fail for one reason, after its restoration even."""
    for path in filter(None, (mask, reference)):
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


def _sum_up(everybody: list[dict[str, Any]], as_json: bool) -> None:
    rows = [row for own in everybody for row in own["rows"]]
    skipped = sum(own["skipped"] for own in everybody)
    seconds = max(own["seconds"] for own in everybody)
    restored = [row for row in rows if not row["error"]]
    failed = len(rows) - len(restored)
    megapixels = sum(row["width"] * row["height"] for row in restored) / 1e6
    speed = megapixels / seconds if seconds else 0.0
    counts = {"restored": len(restored), "failed": failed, "skipped": skipped}
    problems = [problem for own in everybody for problem in own["problems"]]
    if as_json:
        sums = {"megapixels": megapixels, "seconds": seconds, "megapixels_per_second": speed}
        print(json.dumps(finite({**counts, **sums, "images": rows}), allow_nan=False))
    elif len(rows) > 1 or skipped:
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        say(f"{told}; {megapixels:.1f} megapixels in {seconds:.1f} s, {speed:.2f} a second")
    for problem in problems[: None if failed else -1]:
        say(f"serpent: error: {problem}")
    raise_if_failed(rows, "restored")
    if problems:
        raise SerpentError(problems[-1])
