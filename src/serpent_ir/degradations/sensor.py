"""What a camera's sensor and its first processing make of a picture.

Noise that follows the light is seen through a mosaic of colour filters, smoothed, sharpened and passed through a tone
curve.

The model of the noise is that of Brooks et al., "Unprocessing Images for Learned Raw Denoising", 2019. A mosaic is
interpolated bilinearly or as Malvar, He and Cutler do, "High-quality linear interpolation for demosaicing of
Bayer-patterned color images", 2004.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.degradations.blur import blur_each

SMOOTHING_RADIUS = 12
"""Pixels to each side that the smoothing of the noise reaches, for standard deviations up to 4."""
SENSOR_MARGIN = 2 + SMOOTHING_RADIUS + 3
"""Pixels around a pixel that decide what a sensor makes of it: interpolation, smoothing and sharpening."""


@dataclass(frozen=True)
class Sensor:
    """A sensor and its camera's processing, for each image of a batch. All attributes are (B,).

    Attributes:
        power: exponent from linear light to the picture's values; 1 / power for the way back.
        contrast: booleans: whether a contrast curve, 3 x^2 - 2 x^3, follows it.
        red, blue: gains of the white balance; green has gain 1.
        shot, read: variances of the noise, in linear light from 0 to 1: `shot` times the light, and `read`.
        mosaic: booleans: whether a pixel sees one colour only and the others are interpolated.
        corrected: booleans: whether that is done by Malvar, He and Cutler's filters and not bilinearly.
        luma, chroma: standard deviations (pixels, up to 4) with which the noise is smoothed.
        blotches: standard deviation of the chroma noise that remains afterwards, as the blotches that cameras leave.
            1 means that it is as strong as the white noise was before.
        waves: the same for the luma noise that remains with them.
        sharpening: how much of what a blur of 1 pixel removes from the noise is added back.
        strength: factor on the noise after that.
    """

    power: Tensor
    contrast: Tensor
    red: Tensor
    blue: Tensor
    shot: Tensor
    read: Tensor
    mosaic: Tensor
    corrected: Tensor
    luma: Tensor
    chroma: Tensor
    blotches: Tensor
    waves: Tensor
    sharpening: Tensor
    strength: Tensor


def through_sensor(clean: Tensor, blurred: Tensor, normal: Tensor, sensor: Sensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a sensor makes of a picture that a lens has blurred.

    Args:
        clean: (B, 3, H, W) in [0, 1]. Its upper left pixel must lie at even coordinates of its image.
        blurred: the same after the lens.
        normal: normal numbers of that shape.
        sensor: the sensor of each image.

    Returns:
        The noise, then `blurred` and `clean` as the sensor would give them without noise, all (B, 3, H, W). The picture
        that is seen is the sum of the first two. The third differs from `clean` where there is a mosaic: interpolation
        loses fine detail, which no restoration should be asked to bring back.
    """
    power, contrast, mosaic = (_each(value, clean) for value in (sensor.power, sensor.contrast, sensor.mosaic))
    ones = torch.ones_like(sensor.red)
    gains = torch.stack([sensor.red, ones, sensor.blue], 1).to(clean.device, clean.dtype)[:, :, None, None]
    raw_clean, raw = (_linear(x, power, contrast) / gains for x in (clean, blurred))
    deviation = (raw * _each(sensor.shot, clean) + _each(sensor.read, clean)).sqrt()
    raws = torch.stack([raw_clean, raw, raw + deviation * normal.to(clean.device, clean.dtype)])
    if min(clean.shape[-2:]) > 1:  # an image of a single line lacks one of the colours
        seen = mosaicked(raws.flatten(0, 1)).view_as(raws) * gains
        # It adds differences of one colour to another, so it comes after the white balance.
        correction = gradient_correction((raws * gains).flatten(0, 1)).view_as(raws)
        seen = torch.where(_each(sensor.corrected, clean), seen + correction, seen)
        light = torch.where(mosaic, seen, raws * gains)
    else:
        light = raws * gains
    target, picture, noisy = _toned(light.clamp(0, 1), power, contrast)
    noise = _processed(noisy - picture, sensor)
    # Exact to the last bit where there is no mosaic.
    return noise, torch.where(mosaic, picture, blurred), torch.where(mosaic, target, clean)


def film_grain(x: Tensor, normal: Tensor, strength: Tensor, size: Tensor) -> Tensor:
    """Film grain, the same in all colours and strongest in the middle tones.

    Args:
        x: (B, 3, H, W) in [0, 1].
        normal: normal numbers (B, 1, H, W).
        strength: (B,) standard deviation of the grain at half the brightness, on the [0, 1] scale.
        size: (B,) standard deviation of a grain in pixels, from 0.5 to 2.
    """
    grain = blur_each(normal.to(x.device, x.dtype), size, SMOOTHING_RADIUS)
    grain = grain * _each(_taken_from_white(size) * strength, x)
    luma = luma_of(x).clamp(0, 1)
    return grain * (4 * luma * (1 - luma)).sqrt()


def mosaicked(x: Tensor) -> Tensor:
    """(B, 3, H, W), sides at least 2, seen through a Bayer mosaic and interpolated bilinearly.

    Red is at even rows and columns, blue at odd ones. Borders are reflected.
    """
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)[:, None] % 2
    columns = torch.arange(width, device=x.device) % 2
    masks = torch.stack([(1 - rows) * (1 - columns), (rows + columns) % 2, rows * columns]).to(x.dtype)
    padded = F.pad(x * masks, (1, 1, 1, 1), mode="reflect")
    beside = (padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]) / 2
    above = (padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]) / 2
    corners = padded[..., :-2, :] + padded[..., 2:, :]
    corners = (corners[..., :-2] + corners[..., 2:]) / 4
    middle = padded[..., 1:-1, 1:-1]
    # For red and blue a pixel has itself, two neighbours, or four corners; for green itself, or four neighbours.
    red_blue = middle + beside + above + corners
    green = middle + (beside + above) / 2
    return torch.cat([red_blue[:, :1], green[:, 1:2], red_blue[:, 2:]], 1)


def gradient_correction(x: Tensor) -> Tensor:
    """What Malvar, He and Cutler add to `mosaicked(x)`: the second differences of the colour that a pixel does see.

    They weigh these by 1/2 for green, 5/8 at green pixels and 3/4 for red at blue pixels and for blue at red ones.
    x is (B, 3, H, W), and so is the result, zero where a colour is seen. It may leave [0, 1]. Borders are reflected.
    Images with a side of 2 get none.
    """
    height, width = x.shape[-2:]
    if min(height, width) < 3:
        return torch.zeros_like(x)
    odd_row = torch.arange(height, device=x.device)[:, None] % 2 == 1
    odd_column = torch.arange(width, device=x.device) % 2 == 1
    green = odd_row != odd_column
    raw = torch.where(green, x[:, 1:2], torch.where(odd_row, x[:, 2:], x[:, :1]))
    padded = F.pad(raw, (2, 2, 2, 2), mode="reflect")
    across = padded[..., 2:-2, :-4] + padded[..., 2:-2, 4:]
    down = padded[..., :-4, 2:-2] + padded[..., 4:, 2:-2]
    corners = padded[..., 1:-3, :] + padded[..., 3:-1, :]
    corners = corners[..., 1:-3] + corners[..., 3:-1]
    of_own = raw - (across + down) / 4
    beside = 5 / 8 * raw - (corners + across) / 8 + down / 16  # for the colour to the left and right of a green pixel
    above = 5 / 8 * raw - (corners + down) / 8 + across / 16
    zero = torch.zeros_like(raw)
    other = 3 / 4 * of_own
    red = torch.where(green, torch.where(odd_row, above, beside), torch.where(odd_row, other, zero))
    blue = torch.where(green, torch.where(odd_row, beside, above), torch.where(odd_row, zero, other))
    return torch.cat([red, torch.where(green, zero, of_own / 2), blue], 1)


def _linear(x: Tensor, power: Tensor, contrast: Tensor) -> Tensor:
    """The linear light of values in [0, 1]."""
    x = torch.where(contrast, 0.5 - torch.sin(torch.asin((1 - 2 * x).clamp(-1, 1)) / 3), x)
    return x.clamp(0, 1) ** power


def _toned(light: Tensor, power: Tensor, contrast: Tensor) -> Tensor:
    """The values of linear light in [0, 1]."""
    x = light ** (1 / power)
    return torch.where(contrast, x * x * (3 - 2 * x), x)


def _processed(noise: Tensor, sensor: Sensor) -> Tensor:
    """Noise (B, 3, H, W) after a camera's smoothing and sharpening."""
    luma = luma_of(noise)
    parts = torch.cat([luma, luma, noise - luma], 1)
    parts = blur_each(parts, torch.stack([sensor.luma, *[sensor.chroma] * 4], 1), SMOOTHING_RADIUS)
    kept = sensor.blotches * _taken_from_white(sensor.chroma)
    waves = parts[:, 1:2] * _each(kept * sensor.waves, noise)
    noise = parts[:, :1] + waves + parts[:, 2:] * _each(kept, noise)
    softer = blur_each(noise, torch.ones_like(sensor.luma), 3)
    noise = noise + _each(sensor.sharpening, noise) * (noise - softer)
    return noise * _each(sensor.strength, noise)


def _taken_from_white(sigma: Tensor) -> Tensor:
    """The factor by which a Gaussian blur divides the standard deviation of white noise."""
    return (2 * math.sqrt(math.pi) * sigma).clamp(min=1)


def luma_of(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), by ITU-R BT.601."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _each(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) on the device of `like`, and in its dtype unless the values are booleans."""
    value = value.to(like.device) if value.dtype == torch.bool else value.to(like.device, like.dtype)
    return value[:, None, None, None]
