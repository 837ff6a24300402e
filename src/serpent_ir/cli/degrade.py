"""serpent degrade."""

from dataclasses import replace
from typing import TYPE_CHECKING

from serpent_ir.cli.files import convert_files, plan_files
from serpent_ir.cli.shell import Inputs, Output, Seed, Task, shell_command

if TYPE_CHECKING:
    from serpent_ir.image import Picture


@shell_command("Degrade clean images. The outputs have 8 bits; sr8 writes the small files.")
def degrade(inputs: Inputs, output: Output, task: Task, seed: Seed = 0) -> None:
    """Write degraded versions of image files and folders of them, in 8 bits, RGB, without alpha.

    The noise of the i-th image is that of the i-th image of an evaluation with this seed (grey images get it in
    colour, as they do there). Images are cropped on the right and bottom to a multiple of the task's scale. Inputs,
    output and errors are those of `restore`.
    """
    import numpy as np

    from serpent_ir.degradations import create_degradation, evaluation_generator
    from serpent_ir.image import to_pixels, to_tensor

    degradation = create_degradation(task)

    def degraded(index: int, picture: "Picture") -> "Picture":
        clean = degradation.crop(to_tensor(picture.pixels))
        y = degradation(clean, generator=evaluation_generator(seed, index))
        profile = None if picture.is_grey else picture.icc_profile  # one for grey does not fit RGB
        return replace(picture, pixels=to_pixels(y, np.uint8), alpha=None, mode="RGB", icc_profile=profile)

    convert_files(plan_files(inputs, output), degraded, "degraded")
