"""Samples of an image as it comes and goes: integers or floats, colour or grey, beside alpha."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.image import Pixels
from serpent_ir.image.picture import Span
from serpent_ir.image.pillow import colours_and_alpha, copy_rows
from serpent_ir.image.tensors import as_floats, as_samples, to_tensor
from serpent_ir.system.transfers import converts, download, upload, upload_parts

Samples = tuple[np.ndarray, np.ndarray | None]
"""Colour (h, w, 3) or grey (h, w), and alpha (h, w) or None."""
SamplesThere = tuple[Tensor, Tensor | None]
"""The same on a device."""
Read = Callable[[Span, Span], Samples | SamplesThere]
"""Gives rows and columns of an image."""

# Noise takes a degraded image a little out of [0, 1]; values beyond these are on another scale (0 to 255, most often).
_LOWEST, _HIGHEST = -1.0, 2.0


class InMemory:
    """A `Read` of an image that is in memory, for a device that converts. It uploads the image once.

    That is when all of it is asked for. Before that, parts are cut from main memory, so that an image need not fit on
    the device.

    Args:
        size: height and width.
        part: gives rows and columns from main memory.
        whole: uploads all of them.
    """

    def __init__(self, size: Span, part: Callable[[Span, Span], Samples], whole: Callable[[], SamplesThere]):
        self._all, self.part, self._whole = ((0, size[0]), (0, size[1])), part, whole
        self._there: SamplesThere | None = None

    def __call__(self, rows: Span, columns: Span) -> Samples | SamplesThere:
        if self._there is None:
            if (rows, columns) != self._all:
                return self.part(rows, columns)
            self._there = self._whole()
        colours, alpha = self._there
        here = slice(*rows), slice(*columns)
        return colours[here], None if alpha is None else alpha[here]


def of_arrays(colours: np.ndarray, alpha: np.ndarray | None, device: torch.device) -> Read:
    """Reads arrays (H, W, 3) or (H, W), and (H, W)."""

    def part(rows: Span, columns: Span) -> Samples:
        here = slice(*rows), slice(*columns)
        return colours[here], None if alpha is None else alpha[here]

    def whole() -> SamplesThere:
        return upload(colours, device), None if alpha is None else upload(alpha, device)

    return InMemory((colours.shape[0], colours.shape[1]), part, whole) if converts(device) else part


def of_pillow(image: Image.Image, device: torch.device) -> Read:
    """Reads an image of mode RGB or RGBA."""
    width, height = image.size
    shape = height, width, len(image.getbands())

    def part(rows: Span, columns: Span) -> Samples:
        return colours_and_alpha(image.crop((columns[0], rows[0], columns[1], rows[1])))

    def whole() -> SamplesThere:
        there = upload_parts(shape, torch.uint8, lambda rows, into: copy_rows(image, rows, into.numpy()), device)
        return there[..., :3], there[..., 3] if shape[2] == 4 else None

    return InMemory((height, width), part, whole) if converts(device) else part


def floats(samples: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """(h, w, 3) or (h, w), uint8 or uint16 -> (1, 3, h, w) or (1, 1, h, w) float32 in [0, 1].

    They are made on a device that converts, and stay in main memory beside another.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    if isinstance(samples, np.ndarray):
        if not converts(device):
            return to_tensor(samples)
        samples = upload(samples, device)
    return as_floats(samples)[None]


def integers(strip: Tensor, dtype: torch.dtype, *, grey: bool, before: Samples | SamplesThere | None = None) -> Tensor:
    """(1, 3, H, W), which is used up -> (H, W, 3), or (H, W) of their mean, as integers where it is.

    Where the alpha of `before` is 0, its colours are kept.
    """
    made = as_samples(strip, dtype, grey=grey)[0]
    if before is None or before[1] is None or not hides(before[1]):
        return made
    alpha, colours = (_choosable(_there(part, made.device)) for part in (before[1], before[0]))
    shown = alpha != 0
    return torch.where(shown if grey else shown[..., None], _choosable(made), colours).view(dtype)


def hides(alpha: np.ndarray | Tensor) -> bool:
    """Whether it is 0 anywhere."""
    return not (_choosable(alpha) if isinstance(alpha, Tensor) else alpha).all()


def _there(samples: np.ndarray | Tensor, device: torch.device) -> Tensor:
    return upload(samples, device) if converts(device) or isinstance(samples, np.ndarray) else samples


def _choosable(samples: Tensor) -> Tensor:
    """The same bits in a dtype that PyTorch compares and chooses from."""
    return samples.view(torch.int16) if samples.dtype == torch.uint16 else samples


def in_memory(samples: Tensor) -> np.ndarray:
    """Samples as an array of the caller's own."""
    return download(samples).numpy() if converts(samples.device) else samples.cpu().numpy()


def joined(whole: np.ndarray | None, strip: np.ndarray, top: int, height: int) -> tuple[np.ndarray, int]:
    """An image of so many rows with a strip in it from `top` on, and the row after that. The first strip begins it."""
    if whole is None:
        whole = strip if len(strip) == height else np.empty((height, *strip.shape[1:]), strip.dtype)
    if whole is not strip:
        whole[top : top + len(strip)] = strip
    return whole, top + len(strip)


def grey_to_rgb(grey: Pixels | np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def check_scale(x: Tensor) -> None:
    """Raise UsageError for floats that are on another scale."""
    low, high = (value.item() for value in x.aminmax())
    if not (low >= _LOWEST and high <= _HIGHEST):  # a NaN passes neither
        raise UsageError(f"restore: float images are in [0, 1]; this one spans {low:g} to {high:g}")
