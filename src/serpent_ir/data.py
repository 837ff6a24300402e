"""Folders of images -> batches of (network input, clean) for training, made on the device."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serpent_ir.degradations import Degradation
from serpent_ir.errors import ImageError, UsageError
from serpent_ir.image import read_image

# What counts as an image in a folder. A file that is named is read whatever its suffix is.
SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".dds",
        ".dib",
        ".gif",
        ".hdr",
        ".ico",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pcx",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)


def find_images(folder: Path) -> list[Path]:
    """All image files under a folder, subfolders included, in the order of their paths.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"{folder}: no images in this folder")
    return files


def read_rgb8(path: Path) -> Tensor:
    """An image file as (3, H, W) uint8; deeper files are rounded to 8 bits, alpha is left out."""
    pixels = read_image(path).pixels
    eight = np.rint(pixels / 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return torch.from_numpy(eight.transpose(2, 0, 1).copy())


class ImageCache:
    """Whole images of several folders as uint8 on one device, one tensor (n, 3, H, W) for each size.

    A batch is degraded whole and cropped after, so the border of a crop is blurred by what lies beyond it. Everything
    random in a batch is a function of (seed, step), so training can go on from any step without saved generators.
    """

    def __init__(self, folders: Sequence[Path], degradation: Degradation, device: torch.device):
        self.files = [file for folder in folders for file in find_images(folder)]
        self.degradation = degradation
        self.device = device
        by_size: dict[tuple[int, int], list[Tensor]] = {}
        self.home: list[tuple[tuple[int, int], int]] = []  # of each file: its size and its place in that tensor
        for file in self.files:
            image = degradation.crop(read_rgb8(file))
            size = (image.shape[-2], image.shape[-1])
            self.home.append((size, len(by_size.setdefault(size, []))))
            by_size[size].append(image)
        self.images = {size: torch.stack(group).to(device) for size, group in by_size.items()}

    def __len__(self) -> int:
        return len(self.files)

    def check_crop(self, crop: int) -> None:
        """Raise ImageError if some image is smaller than a square crop."""
        for file, ((height, width), _) in zip(self.files, self.home, strict=True):
            if min(height, width) < crop:
                raise ImageError(f"{file}: {width}x{height} is smaller than the crop of {crop}; remove it or crop less")

    def batch(self, first: int, count: int, crop: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Network input (count, C, crop, crop) and clean image (count, 3, crop, crop), float32, randomly turned.

        The input is degraded, has the clean image's size and is not clamped. `first` is the number of samples drawn
        before this step: the files are walked in a new random order each epoch.
        """
        generator = torch.Generator(self.device).manual_seed(_mix(seed, 1, step))
        groups: dict[tuple[int, int], list[int]] = {}
        for file in self._draw(first, count, seed):
            size, place = self.home[file]
            groups.setdefault(size, []).append(place)
        inputs, cleans = [], []
        for size, places in groups.items():
            clean = self.images[size][self._to_device(places)].float() / 255
            degraded = self.degradation(clean, generator=generator)
            pair = torch.cat([self.degradation.network_input(degraded), clean], 1)
            inputs_group, cleans_group = random_crops(pair, crop, generator).split([pair.shape[1] - 3, 3], 1)
            inputs.append(inputs_group)
            cleans.append(cleans_group)
        return torch.cat(inputs), torch.cat(cleans)

    def _draw(self, first: int, count: int, seed: int) -> list[int]:
        files: list[int] = []
        while count > 0:
            epoch, offset = divmod(first, len(self))
            taken = _epoch_order(len(self), seed, epoch)[offset : offset + count].tolist()
            files += taken
            first, count = first + len(taken), count - len(taken)
        return files

    def _to_device(self, indices: list[int]) -> Tensor:
        tensor = torch.tensor(indices)
        # From pinned memory the copy does not wait for the work that the GPU still has queued.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


@functools.lru_cache(maxsize=2)  # a batch may cross from one epoch into the next
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `count` files are drawn in an epoch."""
    return np.random.Generator(np.random.PCG64(_mix(seed, 0, epoch))).permutation(count)


def random_crops(x: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A random square of each image, in one of the eight orientations: (B, C, H, W) -> (B, C, crop, crop)."""
    count, _, height, width = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1, 1), generator=generator, device=x.device)

    steps = torch.arange(crop, device=x.device)
    flip_rows, flip_columns, transpose = draw(2), draw(2), draw(2)
    down, across = steps[:, None], steps[None, :]
    row = torch.where(transpose == 1, across, down)
    column = torch.where(transpose == 1, down, across)
    row = torch.where(flip_rows == 1, crop - 1 - row, row) + draw(height - crop + 1)
    column = torch.where(flip_columns == 1, crop - 1 - column, column) + draw(width - crop + 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    return x[image, :, row, column].permute(0, 3, 1, 2)


def _mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
