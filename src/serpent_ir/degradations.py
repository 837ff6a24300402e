"""How clean images become degraded ones: y = noise(A x), images in [0, 1] (section 5 of the paper).

A degradation is a linear operator A and then additive Gaussian noise. Images are degraded whole and cropped after, so
that a border never shows inside a crop. Nothing is clamped: y leaves [0, 1] where the noise takes it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.errors import UsageError

BLUR_SIGMA = 3.0
"""Standard deviation of the blur in pixels. The paper gives none."""
BLUR_RADIUS = 30
"""Pixels on each side of the centre of the paper's 61x61 kernel."""
SR_FACTOR = 8
"""The paper's super-resolution factor."""
NOISE_SIGMA = 0.05
"""The paper's noise, as a standard deviation on the [0, 1] scale."""

# Columns of one block of the banded matrix in `_blur_rows_by_blocks`: near the kernel's width, so that half of the
# multiplications with it are useful ones, and a good size for BLAS.
_BLOCK = 64


@dataclass(frozen=True)
class Degradation:
    """y = A x + sigma n: a linear operator, then Gaussian noise.

    Attributes:
        name: the task of this degradation, as in `DEGRADATIONS`.
        operator: A. Maps clean (B, 3, H, W), float32 or float64 in [0, 1], to (B, 3, H / scale, W / scale) on the same
            device and in the same dtype; raises UsageError for a size it does not take.
        scale: the integer factor by which y is smaller than the clean image; 1 where A keeps the size.
        sigma: standard deviation of the noise on the [0, 1] scale.
    """

    name: str
    operator: Callable[[Tensor], Tensor]
    scale: int = 1
    sigma: float = NOISE_SIGMA

    def __call__(self, clean: Tensor, *, generator: torch.Generator) -> Tensor:
        """Degrade clean (B, 3, H, W) in [0, 1] to y (B, 3, H / scale, W / scale), not clamped.

        The noise is drawn where the generator lives, in float32, and then moved: a CPU generator gives one noise for
        every device. The global random state is neither read nor changed. Raises UsageError as the operator does.
        """
        y = self.operator(clean)
        noise = torch.randn(y.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return y + self.sigma * noise.to(y.device, y.dtype)

    def network_input(self, y: Tensor) -> Tensor:
        """What a network that keeps the size sees: y (B, 3, h, w) upsampled to (B, 3, scale h, scale w), bicubic."""
        if self.scale == 1:
            return y
        return F.interpolate(y, scale_factor=self.scale, mode="bicubic", align_corners=False)

    def crop(self, clean: Tensor) -> Tensor:
        """Crop clean (..., H, W) on the right and bottom to sides that are multiples of `scale` (a view).

        Raises UsageError for an image with a side under `scale` px.
        """
        height, width = clean.shape[-2:]
        if min(height, width) < self.scale:
            raise UsageError(
                f"{self.name}: the image is {width}x{height} px and must be at least {self.scale} px on each side"
            )
        return clean[..., : height - height % self.scale, : width - width % self.scale]


def gaussian_blur(x: Tensor) -> Tensor:
    """Blur (B, C, H, W), of any size from 1x1, with the normalised 61x61 Gaussian of standard deviation 3 px.

    The border is reflected about the centre of the edge pixel (numpy's "reflect"). Along a side under 31 px, where
    that is undefined, the edge pixel is repeated. Float32 and float64 are computed as such, autocast or not.
    """
    with torch.autocast(x.device.type, enabled=False):
        blur_rows = _blur_rows_by_blocks if x.device.type == "cpu" else _blur_rows_by_convolution
        for _ in range(2):  # the kernel is separable: rows, then columns
            x = blur_rows(_pad_rows(x)).transpose(-1, -2)
    return x.contiguous()


def bicubic_downsample(x: Tensor) -> Tensor:
    """Shrink (B, C, H, W) 8 times with antialiased bicubic interpolation to (B, C, H / 8, W / 8).

    Raises UsageError unless both sides are multiples of 8.
    """
    height, width = x.shape[-2:]
    if min(height, width) < SR_FACTOR or height % SR_FACTOR or width % SR_FACTOR:
        raise UsageError(
            f"sr8: the image is {width}x{height} px; both sides must be multiples of {SR_FACTOR} (crop it)"
        )
    if width == SR_FACTOR < height:
        # torch 2.13 on a CPU repeats the first row when the result is one pixel wide (but not when it is one high).
        return bicubic_downsample(x.transpose(-1, -2)).transpose(-1, -2)
    size = (height // SR_FACTOR, width // SR_FACTOR)
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


DEGRADATIONS = {
    "deblur": Degradation("deblur", gaussian_blur),
    "sr8": Degradation("sr8", bicubic_downsample, scale=SR_FACTOR),
}
"""Every degradation by name."""


def create_degradation(name: str) -> Degradation:
    """Return the degradation called `name`; an unknown name raises a UsageError that lists the valid ones."""
    try:
        return DEGRADATIONS[name]
    except KeyError:
        raise UsageError(f"unknown degradation {name!r}; the known ones are {', '.join(DEGRADATIONS)}") from None


def evaluation_generator(seed: int, index: int) -> torch.Generator:
    """Return a new CPU generator for image `index` of an evaluation: a function of (seed, index), both >= 0, alone.

    So the noise of an image depends neither on the device nor on which images came before it or share its batch.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"the seed and the index of an image must not be negative; got {seed} and {index}")
    # Hashed rather than added, or image 1 of seed 0 would get the noise of image 0 of seed 1. One 32-bit word, because
    # torch's CPU generator uses no more of its seed.
    word = np.random.SeedSequence([seed, index]).generate_state(1)[0]
    return torch.Generator("cpu").manual_seed(int(word))


def _pad_rows(x: Tensor) -> Tensor:
    """Extend the rows of (B, C, H, W) by the blur's radius on both sides."""
    mode = "reflect" if x.shape[-1] > BLUR_RADIUS else "replicate"
    return F.pad(x, (BLUR_RADIUS, BLUR_RADIUS, 0, 0), mode=mode)


def _blur_rows_by_convolution(x: Tensor) -> Tensor:
    """(B, C, H, W + 60) -> (B, C, H, W) as a depthwise convolution: torch's own kernel on a GPU, never in TF32.

    With channels folded into the batch it would be an ordinary convolution, which cuDNN computes in TF32 by default.
    """
    channels = x.shape[1]
    kernel = _kernel(x.dtype, x.device).expand(channels, 1, 1, -1)
    return F.conv2d(x, kernel, groups=channels)


def _blur_rows_by_blocks(x: Tensor) -> Tensor:
    """(B, C, H, W + 60) -> (B, C, H, W) as products of blocks of each row with one banded matrix.

    On a CPU this is 3 to 15 times faster than a convolution of torch, most of all in float64.
    """
    width = x.shape[-1] - 2 * BLUR_RADIUS
    span = _BLOCK + 2 * BLUR_RADIUS
    blocks = F.pad(x, (0, -width % _BLOCK)).unfold(-1, span, _BLOCK)
    return (blocks @ _band(x.dtype, x.device)).flatten(-2)[..., :width]


@functools.cache
@torch.inference_mode(False)  # a cached inference tensor would break every later call that needs gradients
def _kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The normalised 1-D Gaussian, (61,); computed in float64 on the CPU and rounded once."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    return (weights / weights.sum()).to(device, dtype)


@functools.cache
@torch.inference_mode(False)
def _band(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(block + 60, block): column j holds the kernel in rows j to j + 60."""
    band = torch.zeros(_BLOCK + 2 * BLUR_RADIUS, _BLOCK, dtype=dtype, device=device)
    for column in range(_BLOCK):
        band[column : column + 2 * BLUR_RADIUS + 1, column] = _kernel(dtype, device)
    return band
