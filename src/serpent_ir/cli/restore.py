"""The command `serpent restore`: restores image files, one or many."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serpent_ir.cli.files import raise_if_failed, watched
from serpent_ir.cli.shell import (
    Auto,
    Device,
    Inputs,
    Json,
    Name,
    Output,
    Strength,
    Weights,
    finite,
    model_name,
    say,
    shell_command,
)
from serpent_ir.errors import SerpentError

if TYPE_CHECKING:
    from serpent_ir.cli.files import Watch
    from serpent_ir.files import RestoredFile


@shell_command("Restore images. Outputs keep depth, format, metadata and, unless the weights enlarge, size.")
def restore(
    inputs: Inputs,
    output: Output,
    name: Name = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto (bfloat16 on CUDA), float32 or bfloat16.")] = "auto",
    tile: Annotated[str, typer.Option(help="auto (only if memory is short), none, or pixels a side.")] = "auto",
    tile_overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbouring tiles share.")] = 32,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out images that have an output.")
    ] = False,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record there what is done, and leave that out. A stopped run goes on."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="For inpaint: an image that is white where pixels are missing, or a folder."),
    ] = None,
    strength: Strength = 1.0,
    auto: Auto = None,
    protect: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="An image that is white where the picture stays as it is, or a folder."),
    ] = None,
    pages: Annotated[
        str, typer.Option(metavar="first|all", help="Of a TIFF with several pages: the first, or all into one file.")
    ] = "first",
    compare: Annotated[bool, typer.Option("--compare", help="Also write NAME-compare.png: before and after.")] = False,
    reference: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --compare: the true image, or a folder, to measure by.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore image files and folders of them into a folder, or one file into one file.

    A file that fails is reported on stderr, and the others are done. A last line sums up. Where several processes have
    RANK and WORLD_SIZE set, as `torchrun` sets them, each does its share, and the first one tells the sum.

    Args:
        inputs: as `serpent_ir.files.find_jobs` takes them.
        output: the same.
        name: weights that ship (default `serpent_l.photo`), or the network that `weights` are for.
        weights: a file as `load_model` takes it. Without `name` the file says which network it is for.
        device: as `serpent_ir.inference.pick_device` takes it. Under `torchrun` "auto" is a GPU for each process.
        precision: as for `serpent_ir.restore`.
        tile: the same.
        tile_overlap: the same.
        skip_existing: leave out images whose output is there, whatever made it.
        manifest: leave out images that this file names as done with these settings, and record there what gets done.
        mask: for weights of `inpaint`: an image whose light pixels are missing, or a folder that mirrors the output's.
        strength: as for `serpent_ir.restore`.
        auto: the same. The line of each image says how much of it was left as it was.
        protect: an image whose light pixels stay as they are, or such a folder.
        pages: "first"; or "all", with which each page of a TIFF becomes a page of a TIFF of the same kind.
        compare: also write what `serpent_ir.files.compare` draws, beside each output.
        reference: what the output should look like, as an image or a folder like that of masks. It is measured and
            drawn.
        as_json: print restored, failed and skipped (counts), megapixels (of the inputs), seconds,
            megapixels_per_second, and `images`. Each of these has source, target, seconds, error, width, height, pages
            (how many were restored), tiles (of the page with most), and left (the share that auto left as it was, or
            null). With a reference it also has input_psnr, psnr, input_ssim and ssim.

    Raises:
        UsageError: before any work, for what `find_jobs` refuses, or for an unknown name, device, tile or precision.
        SerpentError: at the end, if files failed.
    """
    from serpent_ir.files import restore_files
    from serpent_ir.system.processes import Meeting

    meeting = Meeting()
    restoration = restore_files(
        inputs, output, model_name(name, weights) if name or not weights else None, weights=weights, device=device,
        precision=precision, tile=int(tile) if tile.isdecimal() else tile, tile_overlap=tile_overlap, pages=pages,
        skip_existing=skip_existing, manifest=manifest, mask=mask, strength=strength, auto=auto, protect=protect,
        compare=compare, reference=reference,
        progress=lambda job, part, parts: watch.tell(job, part, parts, restoration.pages[job.index]),
        report=lambda result: _report(watch, result),
    )  # fmt: skip
    own: dict[str, Any] = {"rows": [], "problems": [], "skipped": 0}
    todo = restoration.todo
    with meeting:
        start = time.perf_counter()
        with watched(todo, "restored", alone=len(todo) == meeting.world == 1 and not as_json) as watch:
            try:
                for result in restoration:
                    if result.status == "skipped":
                        own["skipped"] += 1
                        own["problems"] += [result.error] if result.error else []
            except SerpentError as error:
                own["problems"].append(str(error))
        own |= {"rows": watch.rows, "seconds": time.perf_counter() - start}
        if watch.alone:
            watch.raise_if_failed()
        try:
            everybody = meeting.gather(own)
        except SerpentError as error:
            own["problems"].append(str(error))
            everybody = [own]
    if meeting.rank == 0 or len(everybody) < meeting.world:  # unless all met, each tells of its own
        _sum_up(everybody, as_json)


def _report(watch: "Watch", result: "RestoredFile") -> None:
    job = result.job
    if result.sheet:
        say(f"{job.target} -> {result.sheet} (drawn)")
    if result.status == "skipped":
        return
    names = ("width", "height", "pages", "tiles", "left") if result.width else ()
    facts = {name: getattr(result, name) for name in names}
    details = f", {result.pages} pages" if result.pages > 1 else ""
    details += f", {result.tiles} tiles{' a page' * bool(details)}" if result.tiles > 1 else ""
    if result.left == 1:
        details += ", nothing to mend: left as it was"
    elif result.left is not None and round(100 * result.left):
        details += f", {100 * result.left:.0f} % of it left as it was"
    if "psnr" in result.figures:
        details += f", PSNR {result.figures['input_psnr']:.2f} -> {result.figures['psnr']:.2f} dB"
    watch.report(job, result.error, result.seconds, details, **facts, **result.figures)


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
