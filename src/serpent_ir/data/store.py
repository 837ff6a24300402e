"""Where the pixels of training images are kept, and how windows of them reach the device."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from serpent_ir.data.files import read_pixels
from serpent_ir.data.pack import PackedImage
from serpent_ir.data.packing import in_threads
from serpent_ir.errors import UsageError
from serpent_ir.system.memory import available, host_available
from serpent_ir.system.processes import local_world

Memory = Literal["auto", "device", "host", "stream"]

_SHARE = 1 / 3  # share of the free memory that images may take; the rest is for the network, and for other programs
_CHUNK = 1 << 26  # bytes per copy to the device
_READERS = 4  # threads that copy windows on the host, or wait for the disk


class ImageStore:
    """The pixels of many images, in uint8: on a CUDA device, in the host's memory, or in packed sets on disk.

    `memory` says which of these ("device", "host", "stream"); "auto" takes the first in which they fit. For devices
    other than CUDA they stay where they were read to: decoded files in memory, packed sets on disk and, as far as it
    goes, in the system's cache.
    """

    def __init__(self, files: Sequence[Path | PackedImage], device: torch.device, memory: Memory = "auto"):
        self.device = device
        self._packed = {i: file for i, file in enumerate(files) if isinstance(file, PackedImage)}
        self._images = _read(files)
        self.sizes = np.array([image.shape[:2] for image in self._images], dtype=np.int64)
        """(n, 2): height and width of each image."""
        total = 3 * int(self.sizes.prod(1).sum())
        self.memory = _choose(total, device) if memory == "auto" else memory
        self._flat: Tensor | None = None
        if device.type != "cuda":
            self.memory = "stream"
        elif self.memory == "device":
            self._upload(total)
        elif self.memory == "host":
            whole = in_threads(self._checked, range(len(files)))
            self._images = [np.array(image) if isinstance(image, np.memmap) else image for image in whole]
        if self.memory != "stream":
            self._packed = {}
        self._readers = self._new_readers()

    def __getstate__(self) -> dict[str, Any]:
        """The state without threads, and with packed sets as paths instead of maps: for other processes and copies."""
        state = self.__dict__ | {"_readers": None}
        if self.memory == "stream":
            state["_images"] = [None if i in self._packed else image for i, image in enumerate(self._images)]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = [_mapped(self._packed[i]) if image is None else image for i, image in enumerate(self._images)]
        self._readers = self._new_readers()

    def _new_readers(self) -> ThreadPoolExecutor | None:
        return ThreadPoolExecutor(_READERS) if self.device.type == "cuda" and self._flat is None else None

    def read(self, images: np.ndarray, begins: np.ndarray, height: int, width: int) -> Callable[[], Tensor]:
        """Begin to read windows. `images` (B,) are the numbers of their images, `begins` (B, 2) their first pixels.

        Returns a function that gives the windows, (B, height, width, 3) uint8 on the device. If the images are already
        on the device, use `places` and `gather` instead.
        """
        pinned = self._readers is not None
        staged = torch.empty((len(images), height, width, 3), dtype=torch.uint8, pin_memory=pinned)
        pixels = staged.numpy()

        def copy(first: int, step: int) -> None:
            for i in range(first, len(images), step):
                top, left = begins[i]
                pixels[i] = self._checked(images[i])[top : top + height, left : left + width]

        copying: list[Future[None]] = []
        if self._readers is None:
            copy(0, 1)
        else:
            copying = [self._readers.submit(copy, first, _READERS) for first in range(_READERS)]

        def finish() -> Tensor:
            for part in copying:
                part.result()
            return staged.to(self.device, non_blocking=True)

        return finish

    def places(self, images: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """What `gather` needs to know of windows, (B, 2): where they begin, and the distance from row to row."""
        widths = self.sizes[images, 1]
        return np.stack([self._starts[images] + begins[:, 0] * widths + begins[:, 1], widths], 1)

    def gather(self, places: Tensor, height: int, width: int) -> Tensor:
        """Windows (B, height, width, 3) uint8 of images on the device, from `places` (B, 2)."""
        assert self._flat is not None
        start, stride = places[:, :, None].unbind(1)
        rows = start + torch.arange(height, device=self.device) * stride
        return self._flat[rows[:, :, None] + torch.arange(width, device=self.device)]

    def _checked(self, index: int) -> np.ndarray:
        """The pixels of an image. Those of a packed set are compared with their hash when they are first used."""
        return self._packed[index].pixels if index in self._packed else self._images[index]

    def _upload(self, total: int) -> None:
        """Move the pixels of all images into one tensor (pixels, 3) on the device."""
        sizes = self.sizes.prod(1)
        self._starts = np.cumsum(sizes) - sizes  # first pixel of each image
        self._flat = torch.empty((total // 3, 3), dtype=torch.uint8, device=self.device)
        begin = 0
        while begin < len(sizes):
            end = max(begin + 1, int(np.searchsorted(self._starts, self._starts[begin] + _CHUNK // 3)))
            chunk = np.concatenate([image.reshape(-1, 3) for image in in_threads(self._checked, range(begin, end))])
            self._flat[self._starts[begin] :][: len(chunk)] = torch.from_numpy(chunk)
            begin = end
        self._images = []
        torch.cuda.synchronize(self.device)  # because other streams will read it


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device. It is copied after what the current stream has queued, and nothing waits for the copy."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _read(files: Sequence[Path | PackedImage]) -> list[np.ndarray]:
    """The pixels of each file. Files are decoded; packed images are mapped and not read yet."""
    images: list[np.ndarray] = []
    decoded, limit = 0, host_available() / local_world()  # each process reads all images
    for file, pixels in zip(files, in_threads(_mapped, files), strict=True):
        images.append(pixels)
        if isinstance(file, Path):
            decoded += pixels.nbytes
            if decoded > 0.9 * limit:
                raise UsageError(f"{file}: the images before it fill the memory; `serpent data pack` their folder")
    return images


def _mapped(image: Path | PackedImage) -> np.ndarray:
    return image.pack.pixels(image.index) if isinstance(image, PackedImage) else read_pixels(image)


def _choose(total: int, device: torch.device) -> Memory:
    if total <= _SHARE * available(device):
        return "device"
    return "host" if total * local_world() <= _SHARE * host_available() else "stream"
