"""Makes batches of (network input, clean) from images, degraded, cropped and turned on the device."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serpent_ir.data.files import list_images
from serpent_ir.data.graphed import GraphedBatches
from serpent_ir.data.store import ImageStore, Memory, to_device
from serpent_ir.degradations import Degradation, ImageGenerators
from serpent_ir.degradations.randomness import image_keys
from serpent_ir.errors import ImageError

# Devices where samples are made one by one, since the last bits of a CPU's sums depend on how many images it batches.
_APART = ("cpu",)


SATURATION_UNIT = 1024
LARGEST_SATURATION = 3.0
"""The largest factor by which the colours of a training image are made stronger."""


class Column:
    """The columns of `Windows.numbers`: everything that differs between the windows of a batch."""

    KEY = 0  # of the sample's generator
    BEGIN = slice(1, 3)  # the window's first row and column in the degraded image
    SIZE = slice(3, 5)  # the degraded image's height and width
    ORIENTATION = slice(5, 8)  # the crop in the flattened window: first pixel, steps down and across
    GIVEN = slice(8, 11)  # the same in the flattened input of a network, which is smaller if networks enlarge
    SATURATION = 11  # by how much colours are made stronger, in units of 1 / SATURATION_UNIT
    PLACE = slice(12, None)  # where the pixels lie, for `ImageStore.gather`; only with images on the device


@dataclass(frozen=True)
class Windows:
    """The part of a batch whose windows have one shape. A window holds a crop and what the crop depends on."""

    places: np.ndarray  # (B,) positions in the batch
    shape: tuple[int, int]
    kind: int  # number of the degradation
    pixels: Callable[[], Tensor] | None  # what `ImageStore.read` returned; None if the images are on the device
    numbers: np.ndarray  # (B, 12 or more) int64, with the columns of `Column`


class TrainingSet:
    """Images from folders and packed sets, and batches made of them.

    An image is degraded as a whole and then cropped, so the border of a crop is blurred by what lies beyond it. Only
    the crop and what it depends on (`Degradation.margin`) are computed, and the numbers are the same. Everything random
    about a sample is a function of the seed and the sample's number alone. So samples are the same however they are
    divided over batches and processes (on a CPU to the last bit), and training can continue from any of them without
    saved generators.

    Args:
        paths: what `list_images` takes. Files are decoded once, now; packed sets are mapped.
        degradation: what is done to the images. If there are several, which must make images of the same kind, samples
            get them in turn.
        device: where batches are made.
        memory: where the images are kept, as `ImageStore` takes it.
        vivid: the share of samples whose colours are made stronger before they are degraded.

    Raises:
        UsageError: as `list_images`; or decoded images fill the memory.
        ImageError: a file cannot be read, or is smaller than the degradation takes.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        degradation: Degradation | Sequence[Degradation],
        device: torch.device,
        *,
        memory: Memory = "auto",
        vivid: float = 0.0,
    ):
        self.files = [file for path in paths for file in list_images(path)]
        turns = [degradation] if isinstance(degradation, Degradation) else list(degradation)
        self.degradations = list(dict.fromkeys(turns))
        self._turns = np.array([self.degradations.index(each) for each in turns])
        self.device, self.vivid = device, vivid
        self.store = ImageStore(self.files, device, memory)
        self.scale, self.network_scale = self.degradations[0].scale, self.degradations[0].network_scale
        self.sizes = self.store.sizes // self.scale * self.scale  # as in Degradation.crop
        self.check_crop(self.scale)

    def __len__(self) -> int:
        return len(self.files)

    def check_crop(self, crop: int) -> None:
        """Raise ImageError if some image is smaller than a square crop."""
        largest, image = self.largest_crop()
        if crop > largest:
            raise ImageError(f"{image} is smaller than the crop of {crop}; remove it or crop less")

    def largest_crop(self) -> tuple[int, str]:
        """Side of the largest square that fits into every image, and the image that limits it, with its size."""
        sides = self.sizes.min(1)
        smallest = int(sides.argmin())
        height, width = self.store.sizes[smallest]
        return int(sides[smallest]), f"{self.files[smallest]}: {width}x{height}"

    def batch(self, samples: Sequence[int], crop: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Network input (B, C, crop, crop) and target (B, 3, crop, crop) of these samples, float32 on the device.

        The input is degraded and not clamped. Where networks enlarge (`network_scale`) it is so many times smaller.
        Samples are numbered from 0. Each epoch of `len(self)` samples takes every image once, in an order of its own.
        """
        return self.finish(self.begin(samples, crop, seed=seed), crop)

    def begin(self, samples: Sequence[int], crop: int, *, seed: int) -> list[Windows]:
        """The first half of `batch`: draw windows, and begin to read those that are not on the device."""
        numbers = np.asarray(samples, dtype=np.int64)
        images = self._images_of(numbers, seed)
        sizes = self.sizes[images]
        # Positions and orientations have separate keys from those of the degradation.
        own, keys = np.split(_keys(seed, np.concatenate([2 * numbers, 2 * numbers + 1])), 2)
        draws = _generators(own)
        step = self.network_scale  # crops begin where a pixel of the input does
        free = torch.from_numpy((sizes - crop) // step + 1)
        corners = torch.stack([draws.below(free[:, axis]) for axis in (0, 1)], 1).numpy() * step
        turns = draws.below(8).numpy()
        kinds = self._turns[numbers % len(self._turns)]
        begins, ends = self._windows(corners, sizes, kinds, crop)
        shapes = ends - begins
        oriented = [
            column
            for of in (1, step)
            for column in _orient((corners - begins) // of, turns, crop // of, shapes[:, 1] // of)
        ]
        unit = np.full(len(keys), SATURATION_UNIT)
        if self.vivid:
            chosen = draws.rand(1)[:, 0].numpy() < self.vivid
            unit[chosen] += draws.below(round((LARGEST_SATURATION - 1) * SATURATION_UNIT)).numpy()[chosen]
        columns = [keys, begins // self.scale, sizes // self.scale, *oriented, unit]
        on_device = self.store.memory == "device"
        if on_device:
            columns.append(self.store.places(images, begins))
        table = np.column_stack(columns)
        together: dict[object, list[int]] = {}
        for place, alike in enumerate(zip(kinds.tolist(), *shapes.T.tolist(), strict=True)):
            together.setdefault(place if self.device.type in _APART else alike, []).append(place)
        groups = []
        for places in map(np.array, together.values()):
            height, width = shapes[places[0]].tolist()
            pixels = None if on_device else self.store.read(images[places], begins[places], height, width)
            groups.append(Windows(places, (height, width), int(kinds[places[0]]), pixels, table[places]))
        return groups

    def finish(self, groups: list[Windows], crop: int, graphed: GraphedBatches | None = None) -> tuple[Tensor, Tensor]:
        """The second half of `batch`: everything that runs on the device, after the host has read what it must.

        With `graphed` it runs from CUDA graphs, if the images are on the device.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [self._finish(group, crop, graphed) for group in groups]
            if len(parts) == 1:
                return parts[0]
            inputs, cleans = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            order = to_device(np.argsort(np.concatenate([group.places for group in groups])), self.device)
            return inputs[order], cleans[order]

    def _finish(self, group: Windows, crop: int, graphed: GraphedBatches | None) -> tuple[Tensor, Tensor]:
        if group.pixels is not None:
            return self._make(group.pixels(), to_device(group.numbers, self.device), group.kind, crop)

        def make(table: Tensor) -> tuple[Tensor, Tensor]:
            return self._make(self.store.gather(table[:, Column.PLACE], *group.shape), table, group.kind, crop)

        if graphed is None:
            return make(to_device(group.numbers, self.device))
        return graphed(make, group.numbers, key=(group.shape, group.kind, crop))

    def _make(self, pixels: Tensor, numbers: Tensor, kind: int, crop: int) -> tuple[Tensor, Tensor]:
        """Input and target from windows (B, h, w, 3). Everything that differs between batches is in `numbers`."""
        keys, begins, sizes = numbers[:, Column.KEY], numbers[:, Column.BEGIN], numbers[:, Column.SIZE]
        clean = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
        if self.vivid:
            clean = more_saturated(clean, numbers[:, Column.SATURATION] / SATURATION_UNIT)
        degradation = self.degradations[kind]
        degraded, target = degradation.pair(clean, generator=ImageGenerators(keys, begins, sizes))
        places, given = _places(numbers[:, Column.ORIENTATION], crop), degradation.network_input(degraded)
        if self.network_scale == 1:
            return _take(given, places), _take(target, places)
        return _take(given, _places(numbers[:, Column.GIVEN], crop // self.network_scale)), _take(target, places)

    def _windows(
        self, corners: np.ndarray, sizes: np.ndarray, kinds: np.ndarray, crop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and end pixels (B, 2) of what crops at these corners depend on.

        They have one shape for each degradation, except in images that are smaller than that.
        """
        begins, ends = np.zeros_like(sizes), sizes.copy()
        for kind, degradation in enumerate(self.degradations):
            margin, grid = degradation.margin, degradation.grid
            if margin is None:
                continue
            chosen = kinds == kind
            most = _up(np.maximum(sizes[chosen] - (side := _up(crop + 2 * margin + grid - 1, grid)), 0), grid)
            begins[chosen] = np.clip((corners[chosen] - margin) // grid * grid, 0, most)
            ends[chosen] = np.minimum(begins[chosen] + side, sizes[chosen])
        return begins, ends

    def _images_of(self, samples: np.ndarray, seed: int) -> np.ndarray:
        epochs, offsets = np.divmod(samples, len(self))
        images = np.empty_like(samples)
        for epoch in set(epochs.tolist()):
            images[epochs == epoch] = _epoch_order(len(self), seed, epoch)[offsets[epochs == epoch]]
        return images


def more_saturated(x: Tensor, factors: Tensor) -> Tensor:
    """Images x (B, 3, H, W) whose colours are so many times (B,) further from grey, in 8 bits."""
    grey = x.mean(1, keepdim=True)
    return (grey + factors[:, None, None, None].to(x.dtype) * (x - grey)).clamp(0, 1).mul(255).round().div(255)


def _orient(
    corners: np.ndarray, turns: np.ndarray, crop: int, width: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For crops in one of eight orientations, three arrays (B,) for flattened windows of these widths.

    They are the position of the first pixel, the step to the pixel below, and the step to the pixel to the right.
    """
    flip_rows, flip_columns, transpose = turns & 1, turns >> 1 & 1, turns >> 2
    rows, columns = (corners + (crop - 1) * np.stack([flip_rows, flip_columns], 1)).T
    down, across = width * (1 - 2 * flip_rows), 1 - 2 * flip_columns
    return rows * width + columns, np.where(transpose, across, down), np.where(transpose, down, across)


def _places(oriented: Tensor, crop: int) -> Tensor:
    """Positions (B, crop, crop) of a crop's pixels in flattened windows, from what `_orient` returned, (B, 3)."""
    first, down, across = oriented[..., None, None].unbind(1)
    steps = torch.arange(crop, device=oriented.device)
    return first + down * steps[:, None] + across * steps


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Pixels (B, C, h, w) of x (B, C, H, W) at positions (B, h, w) in its flattened images."""
    index = places.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).unflatten(2, places.shape[1:])


@functools.lru_cache(maxsize=2)  # since a batch may cross from one epoch into the next
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which `count` images are drawn in an epoch."""
    return np.random.Generator(np.random.PCG64([seed, 0, epoch])).permutation(count)


@functools.lru_cache(maxsize=2)
def _word(seed: int) -> int:
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])


def _keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    return image_keys(_word(seed), torch.from_numpy(numbers)).numpy()


def _generators(keys: np.ndarray) -> ImageGenerators:
    """Generators on the host, for numbers that belong to no position in an image."""
    nowhere = torch.zeros(len(keys), 2, dtype=torch.int64)
    return ImageGenerators(torch.from_numpy(keys), nowhere, nowhere)


def _up(sides, grid: int):
    """Round up to multiples of the grid."""
    return -(-sides // grid) * grid
