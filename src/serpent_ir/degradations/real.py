"""Pictures as they come in practice: through a lens, a sensor or film, a camera's JPEG, and a messenger, in that order.

All of it is mild. Each step is left out for a share of the pictures, and some pictures are left unchanged.

WebP is not among it. VP8 predicts a block from the decoded pixels above and to the left of it, in modes that the
encoder chooses block after block, so the last block depends on the first: that is no function of a window, and no
batch.
"""

import math

import torch
from torch import Tensor

from serpent_ir.degradations.jpeg import through_jpeg
from serpent_ir.degradations.lens import LENS_RADIUS, disc_kernel, gaussian_kernel, motion_kernel, through_lens
from serpent_ir.degradations.randomness import Generator, ImageGenerators, between, rand_each, randint, randn_like, some
from serpent_ir.degradations.resampling import KERNELS, LARGEST_SCALE, RESAMPLING_MARGIN, down_and_up
from serpent_ir.degradations.sensor import SENSOR_MARGIN, Sensor, film_grain, through_sensor

UNTOUCHED = 0.12
"""Share of pictures that are left unchanged."""
LENS, BLURS, DISCS, MOTIONS = 0.35, (0.3, 1.5), (0.5, 2.5), (1.0, 6.0)
"""Share of pictures blurred by a lens; ranges, in pixels, of Gaussian deviation, disc radius and motion length."""
SENSOR, GRAIN = 0.75, 0.05
"""Share of pictures with sensor noise, and share with film grain."""
MOSAIC, CORRECTED = 0.7, 0.35
"""Share of sensors with a mosaic, and share whose mosaic is interpolated by Malvar, He and Cutler's filters."""
SHOT = (1e-4, 0.012)
"""Range of the variance of shot noise at full light. Its logarithm is drawn uniformly; read noise depends on it."""
STRENGTH = (0.7, 1.6)
"""Range of the factor on a sensor's noise after it was smoothed."""
CAMERA, CAMERA_QUALITIES, FULL_CHROMA = 0.85, (70, 100), 0.3
"""Share of pictures that a camera writes as JPEG, their range of quality, and the share of those with full chroma."""
MESSENGER, MESSENGER_QUALITIES, SMALLER = 0.2, (60, 95), 0.5
"""Share of pictures that are sent as JPEG, their range of quality, and the share of those that are downsized first."""
REAL_GRID = 16
"""Side of JPEG's blocks when chroma is halved, in pixels."""
REAL_MARGIN = (2 + REAL_GRID) + RESAMPLING_MARGIN + 2 + SENSOR_MARGIN + LENS_RADIUS
"""Pixels around a crop that decide it: blocks at any offset and the next chroma pixel, the resampling, the chroma of
blocks on the grid, and around these what sensor and lens see."""

_LENS_DRAWS, _NOISE_DRAWS, _JPEG_DRAWS, _MESSENGER_DRAWS = 7, 16, 2, 4  # random numbers that each step takes


def real(clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Clean (B, 3, H, W) as a camera and a messenger would give it, in multiples of 1/255; and the target to restore.

    The target is clean. Where a sensor's mosaic is interpolated, it is clean after that interpolation.
    """
    (untouched,) = rand_each(generator, len(clean), 1)
    touched = untouched >= UNTOUCHED
    x = _lens(clean, touched, generator)
    x, target = _noise(clean, x, touched, generator)
    x = _jpeg(x, CAMERA, CAMERA_QUALITIES, touched, generator)
    x = _messenger(x, touched, generator)
    return x.clamp(0, 1).mul(255).round().div(255), target


def _lens(clean: Tensor, touched: Tensor, generator: Generator) -> Tensor:
    """Blur some images: a third of them with a Gaussian, a third out of focus, a third moved."""
    there, kind, *how = rand_each(generator, len(clean), _LENS_DRAWS)
    there = (there < LENS) & touched
    if not some(there):
        return clean
    sharp = torch.zeros_like(kind)
    kernels = gaussian_kernel(sharp)
    for number, kernel in enumerate(
        (
            gaussian_kernel(between(how[0], *BLURS)),
            disc_kernel(between(how[1], *DISCS)),
            motion_kernel(between(how[2], *MOTIONS), between(how[3], 0, math.pi), between(how[4], -0.5, 0.5)),
        )
    ):
        chosen = there & (kind >= number / 3) & (kind < (number + 1) / 3)
        kernels = torch.where(chosen[:, None, None], kernel, kernels)
    return through_lens(clean, kernels)


def _noise(clean: Tensor, x: Tensor, touched: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Add the noise of a sensor or the grain of a film. Also returns the target to restore."""
    kind, *how = rand_each(generator, len(clean), _NOISE_DRAWS)
    of_sensor, of_film = (kind < SENSOR) & touched, (kind >= 1 - GRAIN) & touched
    normal = randn_like(clean, generator)
    target = clean
    if some(of_sensor):
        shot = between(how[3], math.log(SHOT[0]), math.log(SHOT[1]))
        sensor = Sensor(
            power=torch.where(how[0] < 0.5, 2.2, between(how[1], 1.8, 2.6)),
            contrast=how[2] < 0.3,
            red=between(how[4], 1.2, 2.6),
            blue=between(how[5], 1.2, 2.2),
            shot=shot.exp(),
            read=(2.18 * shot + 1.2 + between(how[6], -0.5, 0.5)).exp(),
            mosaic=how[7] < MOSAIC,
            corrected=how[7] < CORRECTED,
            luma=between(how[8], 0, 1.2),
            chroma=between(how[9], 0, 4),
            blotches=between(how[13], math.log(0.08), math.log(0.6)).exp(),
            waves=between(how[14], -0.5, 0.7).clamp(min=0),
            sharpening=between(how[10], 0, 1) * (how[11] < 0.3),
            strength=between(how[12], *STRENGTH),
        )
        noise, seen, ideal = through_sensor(clean, x, normal, sensor)
        chosen = _each(of_sensor, x)
        target = torch.where(chosen, ideal, target)
        x = torch.where(chosen, seen + noise, x)
    if some(of_film):
        grain = film_grain(x, normal[:, :1], between(how[13], 0.01, 0.04), between(how[14], 0.5, 1.2))
        x = torch.where(_each(of_film, x), x + grain, x)
    return x, target


def _jpeg(x: Tensor, share: float, qualities: tuple[int, int], touched: Tensor, generator: Generator) -> Tensor:
    there, full = rand_each(generator, len(x), _JPEG_DRAWS)
    quality = randint(generator, len(x), *qualities)
    there = (there < share) & touched
    if not some(there):
        return x
    return torch.where(_each(there, x), through_jpeg(x, quality, full < FULL_CHROMA), x)


def _messenger(x: Tensor, touched: Tensor, generator: Generator) -> Tensor:
    """Send some images: perhaps downsize them and enlarge them again, then write them with blocks at another offset."""
    batch, _, height, width = x.shape
    there, smaller, scale, full = rand_each(generator, batch, _MESSENGER_DRAWS)
    kernel = randint(generator, batch, 0, len(KERNELS) - 1)
    down, across = (randint(generator, batch, 0, REAL_GRID - 1) for _ in range(2))
    quality = randint(generator, batch, *MESSENGER_QUALITIES)
    there = (there < MESSENGER) & touched
    smaller = there & (smaller < SMALLER)
    if some(smaller):
        if isinstance(generator, ImageGenerators):
            origins, sizes = generator.origins, generator.sizes
        else:
            origins = torch.zeros(batch, 2, dtype=torch.int64)
            sizes = torch.tensor([[height, width]]).expand(batch, -1)
        scaled = down_and_up(x, between(scale, 1, LARGEST_SCALE), kernel, origins, sizes)
        x = torch.where(_each(smaller, x), scaled, x)
    if some(there):
        rows, columns = (_shifted(side, shift.to(x.device)) for side, shift in ((height, down), (width, across)))
        moved = _taken(x, rows, columns)
        moved = through_jpeg(moved, quality, full < FULL_CHROMA)
        rows, columns = (
            torch.arange(side, device=x.device) + shift.to(x.device)[:, None]
            for side, shift in ((height, down), (width, across))
        )
        x = torch.where(_each(there, x), _taken(moved, rows, columns), x)
    return x


def _shifted(side: int, shift: Tensor) -> Tensor:
    """Positions (B, side + 15) of the pixels of lines that begin `shift` (B,) later. The first and last repeat."""
    return (torch.arange(side + REAL_GRID - 1, device=shift.device) - shift[:, None]).clamp(0, side - 1)


def _taken(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (B, C, h, w) of x at rows (B, h) and columns (B, w)."""
    channels, width = x.shape[1], x.shape[-1]
    x = x.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    return x.gather(3, columns[:, None, None].expand(-1, channels, x.shape[2], -1))


def _each(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), on the device of `like`."""
    return value.to(like.device)[:, None, None, None]
