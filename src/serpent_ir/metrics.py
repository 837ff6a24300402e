"""PSNR and SSIM, with one protocol for every number in this project.

RGB images in [0, 1]; both are clamped and rounded to the 8 bits of a saved file first; no border is cropped and nothing
is converted to luminance; one value per image, which the caller averages over images. Computed in float64, so that the
device does not show. torchmetrics is imported at the first call: it brings matplotlib where that is installed.
"""

import torch
from torch import Tensor

from serpent_ir.errors import UsageError

SSIM_WINDOW = 11
"""Side in pixels of SSIM's Gaussian window (standard deviation 1.5), and of the smallest image it takes."""

# Rows of SSIM computed at once: bounds the memory of one image (about 20 float64 copies of the strip).
_STRIP = 512


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, 3, H, W) twice, in [0, 1] -> (B,) float64 on their device.

    -10 log10 of the mean squared error over all pixels and channels. Images that are identical in 8 bits give infinity.
    A NaN in an image makes its value NaN. Raises UsageError if the shapes differ.
    """
    _check_shapes(restored, clean)
    errors = [
        (eight_bits(a) - eight_bits(b)).square().mean() for a, b in zip(restored.split(1), clean.split(1), strict=True)
    ]
    # Not torchmetrics' PSNR: that takes the logarithm's base in float32, which costs 1e-6 dB.
    return -10 * torch.stack(errors).log10()


def ssim(restored: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity of each image: (B, 3, H, W) twice, in [0, 1] -> (B,) float64 on their device.

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, data range 1, biased
    variances, the channels separately. The mean is over every pixel: windows that cross the border see the image
    reflected about the centre of its edge pixel, and nothing is cropped: the default of torchmetrics since its pull
    request 2721 (September 2024). Older torchmetrics and scikit-image leave a border of 5 px out of the mean; this
    function gives the same value with any version.

    A NaN in an image makes its value NaN. Raises UsageError if the shapes differ or a side is under 11 px.
    """
    _check_shapes(restored, clean)
    height, width = clean.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise UsageError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} px; this one is {width}x{height} px"
        )
    return torch.stack([_ssim_of_one(a, b) for a, b in zip(restored.split(1), clean.split(1), strict=True)])


def eight_bits(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the 256 levels of an 8-bit file; any shape -> the same, float64 in [0, 1]."""
    if image.device.type == "mps":  # has no float64
        image = image.cpu()
    return image.double().clamp(0, 1).mul(255).round().div(255)


def _ssim_of_one(restored: Tensor, clean: Tensor) -> Tensor:
    """SSIM of (1, C, H, W), strip by strip; a strip brings the rows that its windows reach and drops their values."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    height = clean.shape[-2]
    reach = SSIM_WINDOW // 2
    sums = []
    for start in range(0, height, _STRIP):
        stop = min(start + _STRIP, height)
        # `reach` rows on either side would do; twice as many above keep a short last strip as high as the window.
        above, below = max(start - 2 * reach, 0), min(stop + reach, height)
        _, similarity = structural_similarity_index_measure(
            eight_bits(restored[..., above:below, :]),
            eight_bits(clean[..., above:below, :]),
            data_range=1.0,
            return_full_image=True,  # its own mean depends on the version: see `ssim`
        )
        sums.append(similarity[..., start - above : stop - above, :].mean((0, 1, 3)).sum())
    return torch.stack(sums).sum() / height


def _check_shapes(restored: Tensor, clean: Tensor) -> None:
    if restored.shape != clean.shape or clean.ndim != 4:
        raise UsageError(
            f"expected two batches of one shape (B, 3, H, W); got {tuple(restored.shape)} and {tuple(clean.shape)}"
        )
