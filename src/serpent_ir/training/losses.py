"""Distances between restored and clean images (B, 3, H, W): scalars, in float32."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

CHARBONNIER_EPS = 1e-3
"""Where Charbonnier's loss changes from a square to a distance, on the [0, 1] scale (Lai et al., LapSRN, 2017)."""

LOG_EPS = 1e-5
"""Mean squared error (50 dB) below which a further reduction hardly counts in the logarithm."""
LOG_WEIGHT = 0.01  # makes gradients about as large as those of L1


def _l1(difference: Tensor) -> Tensor:
    return difference.abs().mean()


def _l2(difference: Tensor) -> Tensor:
    return difference.square().mean()


def _charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + CHARBONNIER_EPS**2).sqrt().mean()


def _log(difference: Tensor) -> Tensor:
    """A loss on PSNR: a good image that gets a little worse counts as much as a poor one."""
    return LOG_WEIGHT * (difference.square().mean((1, 2, 3)) / LOG_EPS).log1p().mean()


LOSSES = {"l1": _l1, "l2": _l2, "charbonnier": _charbonnier, "log": _log}


def create_loss(name: str, frequency: float = 0.0) -> Loss:
    """The loss called `name`, plus `frequency` times the L1 distance of the two-dimensional spectra.

    Spectra are orthonormal, so the weight means the same for every crop. Real and imaginary parts count separately (Cho
    et al., MIMO-UNet, 2021). Every term is a mean over all elements, so the mean of the losses of equal parts of a
    batch is the loss of the batch.
    """
    spatial = LOSSES[name]

    def loss(restored: Tensor, clean: Tensor) -> Tensor:
        difference = restored.float() - clean
        if not frequency:
            return spatial(difference)
        spectrum = torch.view_as_real(torch.fft.rfft2(difference, norm="ortho"))
        return spatial(difference) + frequency * spectrum.abs().mean()

    return loss
