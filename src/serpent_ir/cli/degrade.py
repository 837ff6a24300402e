"""The command `serpent degrade`: makes degraded versions of images."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.files import convert_files
from serpent_ir.cli.shell import Inputs, Output, Seed, Task, shell_command
from serpent_ir.errors import UsageError


@shell_command("Degrade clean images. Outputs have 8 bits per channel; of sr8, sr4 and the like, small images.")
def degrade(
    inputs: Inputs,
    output: Output,
    task: Task,
    seed: Seed = 0,
    masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With inpaint: the folder for the masks, named like the outputs.")
    ] = None,
) -> None:
    """Write degraded versions of image files and of folders of them: 8 bits per channel, RGB, without alpha.

    The i-th image gets the same noise as the i-th image of an evaluation with this seed (grey images get coloured
    noise, as they do there). Images are cropped on the right and at the bottom to a multiple of the task's scale.
    Inputs, output and errors work as in `restore`. The holes of `inpaint` are black. Its masks, in which holes are
    white, are written as PNG into the folder `masks`, where `restore --mask` finds them.
    """
    import numpy as np

    from serpent_ir.degradations import create_degradation, evaluation_generator
    from serpent_ir.files import Job
    from serpent_ir.image import Picture, to_pixels, to_tensor, write_image

    degradation = create_degradation(task)
    if masks and degradation.channels == 3:
        raise UsageError(f"{task} has no masks; leave --masks out")

    def degraded(job: Job, picture: Picture) -> Picture:
        clean = degradation.crop(to_tensor(picture.pixels))
        y = degradation(clean, generator=evaluation_generator(seed, job.index))
        if masks:
            file = masks / (job.target.relative_to(output) if job.target != output else job.target.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            mask = to_pixels(y[:, 3:].expand(-1, 3, -1, -1), np.uint8)
            write_image(file.with_suffix(".png"), Picture(mask, mode="L"))
        profile = None if picture.is_grey else picture.icc_profile  # a grey profile does not fit RGB
        return replace(picture, pixels=to_pixels(y[:, :3], np.uint8), alpha=None, mode="RGB", icc_profile=profile)

    convert_files(inputs, output, degraded, "degraded")
