"""The command `serpent video`: restores the frames of a video."""

import time
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.files import terminated_like_interrupted
from serpent_ir.cli.shell import Auto, Device, Name, Strength, Weights, model_name, progress_of, say, shell_command


@shell_command("Restore a video frame by frame. Everything else it carries is copied, or one line says what is lost.")
def video(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A video file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A .mp4, .mov, .mkv or .webm file.")],
    name: Name = None,
    weights: Weights = None,
    device: Device = "auto",
    strength: Strength = 1.0,
    auto: Auto = None,
    protect: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An image, white where all frames stay as they are.")
    ] = None,
) -> None:
    """Restore a video into a file, as `serpent_ir.files.video.restore_video` does, and show the time left."""
    from serpent_ir.files.video import restore_video
    from serpent_ir.inference import Restorer, pick_device
    from serpent_ir.inference.network import check_task
    from serpent_ir.models import create_model

    name = model_name(name, weights)
    model = create_model(name, pretrained=weights is None, checkpoint_path=weights)
    check_task(model, weights)
    restorer = Restorer(model.to(pick_device(device)), strength=strength, auto=auto)
    start = time.perf_counter()
    with progress_of("frames") as show, terminated_like_interrupted():

        def progress(done: int, total: int) -> None:
            each = (time.perf_counter() - start) / done
            tenth = total and done * 10 // total > (done - 1) * 10 // total
            left = each * (total - done)
            remaining = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            line = f"{each:.2f} s a frame, about {remaining} left" if tenth else None
            show(done, total or None, line)

        count = restore_video(source, output, restorer, protect=protect, progress=progress)
    seconds = time.perf_counter() - start
    say(f"{source} -> {output} ({count} frames, {seconds:.1f} s, {seconds / count:.2f} s a frame)")
