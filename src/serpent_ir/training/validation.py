"""PSNR, SSIM and pictures of the averaged weights, the images shared out among the processes."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from serpent_ir.data import PackedImage
from serpent_ir.degradations import Degradation
from serpent_ir.evaluate import FIGURES, evaluate_image, mean_figure, read_clean
from serpent_ir.training.room import room_for, validating
from serpent_ir.training.workers import Workers

PICTURES = 3
"""Images that are shown, the first ones."""


def validate(
    network: nn.Module,
    files: Sequence[Path | PackedImage],
    degradation: Degradation,
    workers: Workers,
    precision: str = "auto",
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Means over all images, as `serpent evaluate` gives them, and (degraded, restored, clean) of a few.

    The noise of an image is a function of its number, so the means are those of one process. Raises OutOfRoomError for
    an image that does not fit in memory.
    """
    rows, pictures = {}, []
    for index in range(workers.rank, len(files), workers.world):
        clean = read_clean(files[index], degradation)
        with room_for(lambda file=files[index], clean=clean: validating(file, clean, workers)):
            clean = clean.to(workers.device)
            rows[index], given, restored = evaluate_image(network, clean, degradation, index=index, precision=precision)
            if workers.first and len(pictures) < PICTURES:
                pictures.append([image.cpu() for image in (given[:, :3], restored, clean)])
    everyone = {index: row for part in workers.gather(rows) for index, row in part.items()}
    ordered = [everyone[index] for index in sorted(everyone)]
    return {key: mean_figure([row[key] for row in ordered]) for key in FIGURES}, pictures
