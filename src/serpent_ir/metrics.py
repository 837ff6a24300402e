"""PSNR, SSIM and LPIPS, by stated protocols, and BRISQUE, which needs no truth.

Images are RGB in [0, 1]. Both images are first clamped and rounded to the 8 bits of a saved file. There is one value
per image, and the caller averages over images. PSNR and SSIM are computed in float64, so that results do not depend on
the device. By the protocol `rgb`, which all numbers of this project have that name no other, no border is cropped and
nothing is converted to luminance. `PROTOCOLS` holds those of the field, for numbers beside published ones.
"""

import importlib
import importlib.util
import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.errors import SerpentError, UsageError, is_out_of_memory

SSIM_WINDOW = 11
"""Side in pixels of SSIM's Gaussian window (standard deviation 1.5), and of the smallest image it takes."""


@dataclass(frozen=True)
class Protocol:
    """What of two images is compared.

    Attributes:
        luma: Y of YCbCr by ITU-R BT.601 in studio range (16 to 235), not rounded, instead of RGB.
        border: pixels that are cut on each side; None: as many as the scale.
        inside: SSIM is the mean over windows that lie in the image, as Wang's code has it, and not over every pixel.
    """

    luma: bool = False
    border: int | None = 0
    inside: bool = True


PROTOCOLS = {
    "rgb": Protocol(inside=False),
    "sr": Protocol(luma=True, border=None),
    "denoise": Protocol(),
    "jpeg": Protocol(luma=True),
    "ntire-esr": Protocol(border=4),
}
"""`sr`: super-resolution (Set5, Set14). `denoise`: colour denoising (CBSD68, Kodak24, McMaster), whose noise is added
in floating point and not clipped. `jpeg`: JPEG artefacts (LIVE1). `ntire-esr`: the challenges in efficient
super-resolution."""

_STRIP = 128  # rows of SSIM computed at once: memory holds about 20 float64 copies of a strip of one channel
_LUMA = (65.481, 128.553, 24.966)  # of R, G and B in [0, 1]; 16 is added: Y from 16 to 235
_C1, _C2 = 0.01**2, 0.03**2
_GAUSSIAN = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-(SSIM_WINDOW // 2), SSIM_WINDOW // 2 + 1)]
_WEIGHTS = [value / sum(_GAUSSIAN) for value in _GAUSSIAN]


def psnr(restored: Tensor, clean: Tensor, protocol: str = "rgb", *, scale: int = 1) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, 3, H, W) twice, in [0, 1] -> (B,) float64 on their device.

    -10 log10 of the mean squared error over all pixels and channels. Images that are identical in 8 bits give infinity.
    `protocol` is a name of `PROTOCOLS`; that of `sr` asks for the `scale` by which the image was enlarged. A NaN in an
    image makes its value NaN. Raises UsageError if the shapes differ, one is of integers, nothing is left within the
    border, or there is no such protocol.
    """
    _check_shapes(restored, clean)
    known, border = _protocol(protocol, scale, clean)
    if not len(clean):
        return clean.new_zeros(0, dtype=torch.float64)
    # One channel at a time, since float64 copies of a large image take more memory than its restoration.
    errors = [
        torch.stack([(x - y).square().mean() for x, y in _planes(a, b, known, border)]).mean()
        for a, b in zip(restored, clean, strict=True)
    ]
    # torchmetrics' PSNR is not used: it takes the logarithm of the base in float32, which costs 1e-6 dB.
    return -10 * torch.stack(errors).log10()


def ssim(restored: Tensor, clean: Tensor, protocol: str = "rgb", *, scale: int = 1) -> Tensor:
    """Structural similarity of each image: (B, 3, H, W) twice, in [0, 1] -> (B,) float64 on their device.

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, data range 1, biased
    variances, channels separately. By `rgb` the mean is over every pixel, and nothing is cropped: windows that cross
    the border see the image reflected about the centre of its edge pixel. This is the default of torchmetrics since
    its pull request 2721 (September 2024). Older torchmetrics and scikit-image leave a border of 5 px out of the mean;
    this function gives the same value with any version.

    `protocol` and `scale` are as for `psnr`. A NaN in an image makes its value NaN. Raises UsageError if the shapes
    differ, one is of integers, a side within the border is under 11 px, or there is no such protocol.
    """
    _check_shapes(restored, clean)
    known, border = _protocol(protocol, scale, clean)
    height, width = (side - 2 * border for side in clean.shape[-2:])
    if min(height, width) < SSIM_WINDOW:
        raise UsageError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} px; this one is {width}x{height} px"
        )
    if not len(clean):
        return clean.new_zeros(0, dtype=torch.float64)
    return torch.stack([_ssim_of_one(a, b, known, border) for a, b in zip(restored, clean, strict=True)])


class Brisque:
    """How far an image is from natural ones, without a truth (Mittal, Moorthy, Bovik, "No-Reference Image Quality
    Assessment in the Spatial Domain", 2012): about 0 for a good photograph, up to 100 and beyond for a bad one.

    The package `brisque` computes it, with the regression that its authors fitted to the LIVE set.

    Raises UsageError if that package is missing.
    """

    def __init__(self):
        try:
            package: Any = importlib.import_module("brisque")
        except ModuleNotFoundError:
            raise UsageError("BRISQUE needs the package brisque: pip install 'serpent-ir[brisque]'") from None

        class Scorer(package.BRISQUE):
            def scale_features(self, features: Any) -> Any:
                # Version 0.2.0 passes arrays of one element to float(), which NumPy 2.4 refuses (findings).
                return super().scale_features([np.ravel(feature)[0] for feature in features])

        self._scorer = Scorer(url=False)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], rounded to 8 bits first -> (B,) float64 on the CPU.

        NaN for an image without variation or a few pixels wide, of which there are no statistics.
        """
        pixels = eight_bits(images).mul(255).round().byte().movedim(1, -1).cpu().numpy()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of divisions by nothing, and of names that SciPy has moved
            return torch.tensor([float(self._scorer.score(image)) for image in pixels], dtype=torch.float64)


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1): 0 for identical images, lower is closer.

    `weights` is a local copy of torchvision's AlexNet or VGG-16 for ImageNet (`alexnet-owt-7be5be79.pth`,
    `vgg16-397923af.pth`). Its shapes tell which of the two it is. The learned weights of the distance are those that
    torchmetrics ships.

    Raises SerpentError for a file that is neither of the two.
    """

    # For each convolution in `features`: its number in the file, stride, padding, the max pooling before it as (size,
    # stride), and whether the distance looks at its output.
    LAYERS = (
        ("alex", [(0, 4, 2, None, True), (3, 1, 2, (3, 2), True), (6, 1, 1, (3, 2), True), (8, 1, 1, None, True),
                  (10, 1, 1, None, True)]),
        ("vgg", [(i, 1, 1, (2, 2) if i in (5, 10, 17, 24) else None, i in (2, 7, 14, 21, 28))
                 for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]),
    )  # fmt: skip
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
    LEAST = 64  # smallest side of an image, in pixels

    def __init__(self, weights: Path, device: torch.device):
        try:
            state = torch.load(weights, map_location=device, weights_only=True)
            first = state["features.0.weight"].shape
        except FileNotFoundError:
            raise SerpentError(f"{weights}: no such weights file") from None
        except (
            KeyError, TypeError, AttributeError, OSError, RuntimeError, EOFError, pickle.UnpicklingError,
        ) as error:  # fmt: skip
            if is_out_of_memory(error):
                raise
            raise SerpentError(f"{weights}: not torchvision's AlexNet or VGG-16 (a .pth file)") from None
        self.name, self.layers = self.LAYERS[0 if first[-1] == 11 else 1]
        try:
            self.weights = {i: (state[f"features.{i}.weight"], state[f"features.{i}.bias"]) for i, *_ in self.layers}
        except KeyError as error:
            raise SerpentError(f"{weights}: not torchvision's AlexNet or VGG-16 (it has no {error})") from None
        package = importlib.util.find_spec("torchmetrics")
        assert package is not None and package.origin is not None
        heads = Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{self.name}.pth"
        learned = torch.load(heads, map_location=device, weights_only=True)
        self.heads = [learned[f"lin{i}.model.1.weight"] for i in range(5)]

    @torch.no_grad()
    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Distance of each image: (B, 3, H, W) twice, in [0, 1], rounded to 8 bits -> (B,) float64 on their device.

        Raises UsageError if the shapes differ, one is of integers or a side is under 64 px.
        """
        _check_shapes(restored, clean)
        if min(clean.shape[-2:]) < self.LEAST:
            raise UsageError(f"LPIPS needs images of at least {self.LEAST}x{self.LEAST} px")
        pairs = zip(restored.split(1), clean.split(1), strict=True)
        return torch.stack([self._distance(a, b) for a, b in pairs])

    def _distance(self, restored: Tensor, clean: Tensor) -> Tensor:
        shift, scale = (clean.new_tensor(values).view(3, 1, 1).float() for values in (self.SHIFT, self.SCALE))
        x = (2 * eight_bits(torch.cat([restored, clean])).float().to(clean.device) - 1 - shift) / scale
        total = torch.zeros((), dtype=torch.float64, device=clean.device)
        heads = iter(self.heads)
        for i, stride, padding, pool, seen in self.layers:
            if pool is not None:
                x = F.max_pool2d(x, kernel_size=pool[0], stride=pool[1])
            x = F.conv2d(x, *self.weights[i], stride=stride, padding=padding).relu()
            if seen:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                difference = (unit[:1] - unit[1:]).square()
                total += F.conv2d(difference, next(heads)).double().mean()
        return total


def eight_bits(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the 256 levels of an 8-bit file; any shape -> the same, float64 in [0, 1]."""
    if image.device.type == "mps":  # MPS has no float64
        image = image.cpu()
    return image.double().clamp(0, 1).mul(255).round().div(255)


def _protocol(name: str, scale: int, clean: Tensor) -> tuple[Protocol, int]:
    """The protocol of that name, and its border in pixels."""
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; the known ones are {', '.join(PROTOCOLS)}")
    border = PROTOCOLS[name].border
    border = scale if border is None else border
    height, width = clean.shape[-2:]
    if min(height, width) <= 2 * border:
        raise UsageError(f"{name}: nothing is left of {width}x{height} px within a border of {border}")
    return PROTOCOLS[name], border


def _planes(restored: Tensor, clean: Tensor, protocol: Protocol, border: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What is compared of two images (3, H, W): pairs of planes (h, w) float64 in [0, 1], one after the other."""
    inner = slice(border, clean.shape[-2] - border), slice(border, clean.shape[-1] - border)
    images = (restored[:, *inner], clean[:, *inner])
    if not protocol.luma:
        for x, y in zip(*images, strict=True):
            yield eight_bits(x), eight_bits(y)
        return
    x, y = images
    yield _luma(x), _luma(y)


def _luma(image: Tensor) -> Tensor:
    red, green, blue = (eight_bits(plane) * weight for plane, weight in zip(image, _LUMA, strict=True))
    return (red + green + blue + 16) / 255


def _ssim_of_one(restored: Tensor, clean: Tensor, protocol: Protocol, border: int) -> Tensor:
    """SSIM of (C, H, W), one plane and one strip of rows at a time."""
    sums, count = [], 0
    for x, y in _planes(restored, clean, protocol, border):
        height, width = x.shape
        reach = SSIM_WINDOW // 2 if protocol.inside else 0
        columns = _reflected(reach, width - reach, width, x.device)
        for start in range(reach, height - reach, _STRIP):
            rows = _reflected(start, min(start + _STRIP, height - reach), height, x.device)
            windows = _similarity(x[rows][:, columns], y[rows][:, columns])
            sums.append(windows.sum())
            count += windows.numel()
    return torch.stack(sums).sum() / count


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of every window of two (h, w) float64: (h - 10, w - 10)."""
    mean_x, mean_y, xx, yy, xy = _smoothed(_smoothed(torch.stack([x, y, x * x, y * y, x * y]), 1), 2)
    products = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    luminance = (2 * products + _C1) / (squares + _C1)
    return luminance * (2 * (xy - products) + _C2) / (xx + yy - squares + _C2)


def _smoothed(x: Tensor, dim: int) -> Tensor:
    """SSIM's Gaussian along one dimension, without padding.

    It adds shifted views: PyTorch's float64 convolution on a CPU takes many times as long, and unfolds the image.
    """
    length = x.shape[dim] - SSIM_WINDOW + 1
    first, *others = _WEIGHTS
    out = x.narrow(dim, 0, length) * first
    for shift, weight in enumerate(others, 1):
        out.add_(x.narrow(dim, shift, length), alpha=weight)
    return out


def _reflected(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """The positions that windows around `start` to `stop` see, reflected about the first and last of `size` pixels."""
    reach = SSIM_WINDOW // 2
    places = torch.arange(start - reach, stop + reach, device=device).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)


def _check_shapes(restored: Tensor, clean: Tensor) -> None:
    if restored.shape != clean.shape or clean.ndim != 4:
        raise UsageError(
            f"expected two batches of one shape (B, 3, H, W); got {tuple(restored.shape)} and {tuple(clean.shape)}"
        )
    if not (restored.is_floating_point() and clean.is_floating_point()):
        raise UsageError(f"expected floating point in [0, 1]; got {restored.dtype} and {clean.dtype}: divide by 255")
