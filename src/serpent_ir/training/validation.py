"""PSNR, SSIM and pictures of the averaged weights, with the images divided among the processes."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from serpent_ir.data import PackedImage
from serpent_ir.degradations import Degradation
from serpent_ir.evaluate import FIGURES, evaluate_image, mean_figures, read_clean8, to_unit
from serpent_ir.training.room import room_for, validating
from serpent_ir.training.workers import Workers

PICTURES = 3
"""Number of images that are shown: the first ones."""

KEPT_BYTES = 256 << 20
"""Most bytes of decoded pixels that a process keeps from one validation to the next: some 1300 images of 256x256 px.
Even with eight processes that is little compared with what a training takes of a host."""


class ValidationImages:
    """Clean images with which a network is compared again and again.

    Each process reads its share at once, since it is better to find a bad image now than at the first validation.
    Decoded files are kept in 8 bits, up to `KEPT_BYTES`; the others are read again every time. Packed sets are mapped.

    Raises ImageError as `read_clean8` does.
    """

    def __init__(self, files: Sequence[Path | PackedImage], degradation: Degradation, workers: Workers):
        self.files, self.degradation, self.workers = files, degradation, workers
        self._kept: dict[int, Tensor] = {}
        self._input: dict[int, dict[str, float]] = {}  # by image number: the figures of what a network is given
        left = KEPT_BYTES
        for index in self.share():
            pixels = read_clean8(files[index], degradation)
            size = pixels.untyped_storage().nbytes()
            if isinstance(files[index], Path) and size <= left:
                self._kept[index] = pixels
                left -= size

    def __len__(self) -> int:
        return len(self.files)

    def share(self, count: int | None = None) -> range:
        """The numbers of this process's images, out of all or out of the first `count`."""
        return range(self.workers.rank, len(self.files[:count]), self.workers.world)

    def read(self, index: int) -> Tensor:
        """A clean image (1, 3, H, W) float32 in [0, 1]."""
        kept = self._kept.get(index)
        return to_unit(read_clean8(self.files[index], self.degradation) if kept is None else kept)

    def evaluate(
        self, network: nn.Module, clean: Tensor, index: int, precision: str
    ) -> tuple[dict[str, float], Tensor, Tensor]:
        """As `evaluate_image`. What the network is given is always the same, so it is compared with clean only once."""
        found = evaluate_image(
            network, clean, self.degradation, index=index, precision=precision, known=self._input.get(index)
        )
        self._input[index] = {key: figure for key, figure in found[0].items() if key.startswith("input_")}
        return found


def validate(
    network: nn.Module, images: ValidationImages, precision: str = "auto", *, count: int | None = None
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Means over all images, or the first `count`, as in `serpent evaluate`; and (degraded, restored, clean) of a few.

    The noise of an image is a function of its number, so the means are the same as with one process. Raises
    OutOfRoomError for an image that does not fit in memory.
    """
    workers = images.workers
    rows, pictures = {}, []
    for index in images.share(count):
        clean = images.read(index)
        with room_for(lambda file=images.files[index], clean=clean: validating(file, clean, workers)):
            clean = clean.to(workers.device)
            rows[index], given, restored = images.evaluate(network, clean, index, precision)
            if workers.first and len(pictures) < PICTURES:
                pictures.append([image.cpu() for image in (images.degradation.before(given), restored, clean)])
    everyone = {index: row for part in workers.gather(rows) for index, row in part.items()}
    ordered = [everyone[index] for index in sorted(everyone)]
    means = mean_figures(ordered)
    return {key: means[key] for key in FIGURES}, pictures
