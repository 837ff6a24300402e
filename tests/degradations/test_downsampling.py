"""The small images of `sr2`, `sr4`, `photo_x2` and `photo_x4`."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from serpent_ir.degradations import create_degradation
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.errors import UsageError


def photo(height: int, width: int) -> np.ndarray:
    return data.astronaut()[60 : 60 + height, 150 : 150 + width]


def matlab_matrix(length: int, scale: int) -> np.ndarray:
    """The rows of MATLAB's `imresize`, written from its description: all indices of the mirrored line, one by one."""
    small = length // scale
    matrix = np.zeros((small, length))
    for row in range(small):
        centre = (row + 0.5) * scale - 0.5
        for place in range(int(np.floor(centre)) - 2 * scale - 1, int(np.floor(centre)) + 2 * scale + 3):
            x = abs(place - centre) / scale
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            weight = near if x <= 1 else far if x <= 2 else 0.0
            mirrored = place % (2 * length)
            matrix[row, min(mirrored, 2 * length - 1 - mirrored)] += weight
        matrix[row] /= matrix[row].sum()
    return matrix


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 7), (3, 2), (20, 31)])
def test_is_imresize_of_matlab(scale, blocks):
    clean = photo(*(scale * side for side in blocks))
    rows, columns = (matlab_matrix(side, scale) for side in clean.shape[:2])
    expected = np.einsum("ij,jkc,lk->cil", rows, clean.astype(np.float64), columns)
    expected = np.clip(np.floor(expected + 0.5 + 1e-9), 0, 255)
    x = torch.from_numpy(clean).permute(2, 0, 1)[None].float() / 255
    small = create_degradation(f"sr{scale}")(x, generator=torch.Generator())
    assert torch.equal((small[0] * 255).round().double(), torch.from_numpy(expected))
    assert torch.equal(small, (small * 255).round() / 255)


@pytest.mark.parametrize("scale", [2, 4])
def test_is_pillows_bicubic_away_from_the_border(scale):
    """Pillow has the same kernel, and treats borders otherwise."""
    clean = photo(120, 160)
    pillow = np.asarray(Image.fromarray(clean).resize((160 // scale, 120 // scale), Image.Resampling.BICUBIC))
    small = imresize_down(torch.from_numpy(clean).permute(2, 0, 1)[None].double() / 255, scale)[0]
    inside = (slice(2, -2), slice(2, -2))
    levels = (small * 255).round().permute(1, 2, 0).numpy()[inside]
    assert np.abs(levels - pillow[inside]).max() <= 2  # Pillow rounds between the two axes too
    assert np.abs(levels - pillow[inside]).mean() < 0.2


def test_halves_round_up_whatever_the_image_is_kept_in():
    """Two levels next to each other, whose mean is half a level. MATLAB rounds it up."""
    clean = torch.arange(256)[None, None, :, None].expand(1, 3, 256, 2).repeat_interleave(2, 2)
    clean = clean.clone()
    clean[..., 1::2, :] = (clean[..., 1::2, :] + 1).clamp(max=255)
    for dtype in (torch.float32, torch.float64):
        small = imresize_down((clean.to(dtype) / 255), 2)
        levels = (small[0, 0, 2:-2, 0] * 255).round().long()
        assert (levels[1:] - levels[:-1] == 1).all()
    assert levels[0] == 3


@pytest.mark.parametrize("size", [(6, 8), (8, 3), (0, 4)])
def test_other_sizes_are_refused(size):
    with pytest.raises(UsageError, match="multiples of 4"):
        imresize_down(torch.zeros(1, 3, *size), 4)


@pytest.mark.parametrize("scale", [2, 4])
def test_small_photos_have_been_through_a_camera(scale):
    degradation = create_degradation(f"photo_x{scale}")
    clean = torch.from_numpy(photo(128, 128)).permute(2, 0, 1)[None].float().expand(12, -1, -1, -1) / 255
    small, target = degradation.pair(clean, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target, clean)
    away = (small - imresize_down(clean, scale)).abs().mean((1, 2, 3))
    assert (away > 1e-3).sum() > 6
    assert away.max() < 0.2
