"""Blurs of a lens and of a hand: out of focus, or moved while the shutter was open."""

import torch
import torch.nn.functional as F
from torch import Tensor

LENS_RADIUS = 6
"""Pixels on each side of the centre of a lens's kernel."""
_POINTS = 9  # points on the path of a hand


def gaussian_kernel(sigma: Tensor) -> Tensor:
    """Normalised kernels (B, 13, 13) of Gaussians; sigma (B,) in pixels, up to 2."""
    _, _, distance2 = _offsets(sigma)
    return _normalised(torch.exp(-0.5 * distance2 / sigma.clamp(min=1e-3)[:, None, None] ** 2))


def disc_kernel(radius: Tensor) -> Tensor:
    """Normalised kernels (B, 13, 13) of an unfocused lens: discs with smooth rims; radius (B,) in pixels, up to 5."""
    _, _, distance2 = _offsets(radius)
    return _normalised((radius[:, None, None] + 0.5 - distance2.sqrt()).clamp(0, 1))


def motion_kernel(length: Tensor, angle: Tensor, bend: Tensor) -> Tensor:
    """Normalised kernels (B, 13, 13) of a hand that moves along an arc.

    Args:
        length: (B,) length of the arc's chord in pixels, up to 10.
        angle: (B,) angle of the chord to the rows, in radians.
        bend: (B,) distance of the arc's middle from the chord, as a share of half the length.
    """
    rows, columns, _ = _offsets(length)
    kernel = torch.zeros((), dtype=length.dtype, device=length.device)
    for point in range(_POINTS):
        along = 2 * point / (_POINTS - 1) - 1
        x, y = along * length / 2, bend * length / 2 * (1 / 3 - along * along)
        across = x * angle.cos() - y * angle.sin()
        down = x * angle.sin() + y * angle.cos()
        near = (rows - down[:, None, None]) ** 2 + (columns - across[:, None, None]) ** 2
        kernel = kernel + torch.exp(-near / (2 * 0.4**2))
    return _normalised(kernel)


def through_lens(x: Tensor, kernels: Tensor) -> Tensor:
    """Blur each image of (B, C, H, W) with its kernel (B, 13, 13). Borders are reflected, or repeated if too short."""
    batch, channels = x.shape[:2]
    for axes in ((LENS_RADIUS, LENS_RADIUS, 0, 0), (0, 0, LENS_RADIUS, LENS_RADIUS)):
        side = x.shape[-1] if axes[0] else x.shape[-2]
        x = F.pad(x, axes, mode="reflect" if side > LENS_RADIUS else "replicate")
    weights = kernels.to(x.device, x.dtype).repeat_interleave(channels, 0)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        # Each channel of each image is a group: a depthwise convolution, which a GPU never computes in TF32.
        blurred = F.conv2d(x.flatten(0, 1)[None], weights, groups=batch * channels)
    return blurred[0].unflatten(0, (batch, channels))


def _offsets(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (13, 1), columns (1, 13) and squared distances (13, 13) of a kernel's pixels from its centre."""
    line = torch.arange(-LENS_RADIUS, LENS_RADIUS + 1, dtype=like.dtype, device=like.device)
    return line[:, None], line[None], line[:, None] ** 2 + line[None] ** 2


def _normalised(kernels: Tensor) -> Tensor:
    return kernels / kernels.sum((-1, -2), keepdim=True)
