"""The parts of `real`, each against a reference that shares no code with it; and the chain."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve
from skimage import data

from serpent_ir.degradations import RealDegradation, blur_each, create_degradation, through_jpeg
from serpent_ir.degradations.lens import LENS_RADIUS, disc_kernel, gaussian_kernel, motion_kernel, through_lens
from serpent_ir.degradations.resampling import KERNELS, down_and_up
from serpent_ir.degradations.sensor import Sensor, film_grain, gradient_correction, mosaicked, through_sensor
from serpent_ir.evaluate import evaluate_image


def photo(size: int) -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[:size, :size].copy()).permute(2, 0, 1)[None] / 255


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(kernels: torch.Tensor, angle: float) -> torch.Tensor:
    """Standard deviation in pixels along a direction."""
    line = torch.arange(-LENS_RADIUS, LENS_RADIUS + 1, dtype=kernels.dtype)
    along = line[None] * math.cos(angle) + line[:, None] * math.sin(angle)
    return (kernels * along**2).sum((1, 2)).sqrt()


def test_kernels_of_a_lens():
    sizes = torch.tensor([0.0, 0.6, 1.5, 2.0], dtype=torch.float64)
    gaussian, disc = gaussian_kernel(sizes), disc_kernel(2 * sizes)
    angle = torch.full_like(sizes, 0.5)
    motion = motion_kernel(4 * sizes, angle, torch.zeros_like(sizes))
    bent = motion_kernel(4 * sizes, angle, torch.full_like(sizes, 0.5))
    for kernels in (gaussian, disc, motion, bent):
        torch.testing.assert_close(kernels.sum((1, 2)), torch.ones_like(sizes))
        assert (kernels >= 0).all()
    sharp = torch.zeros(13, 13, dtype=torch.float64)
    sharp[LENS_RADIUS, LENS_RADIUS] = 1
    assert torch.equal(gaussian[0], sharp)
    assert torch.equal(disc[0], sharp)
    torch.testing.assert_close(moments(gaussian, 0.3)[2:], sizes[2:], rtol=0.02, atol=0)
    torch.testing.assert_close(moments(disc, 0.3)[2:], sizes[2:], rtol=0.05, atol=0)  # radius / 2
    assert (moments(motion, 0.5)[1:] > moments(motion, 0.5 + math.pi / 2)[1:] + 0.3).all()
    assert (moments(bent, 0.5 + math.pi / 2)[2:] > moments(motion, 0.5 + math.pi / 2)[2:]).all()


@pytest.mark.parametrize("size", [(20, 31), (7, 9), (40, 5), (1, 1)])
def test_each_image_goes_through_its_own_lens(size):
    x = noise(3, 2, *size)
    kernels = motion_kernel(torch.tensor([0.0, 3.0, 9.0]).double(), torch.ones(3).double(), torch.ones(3).double() / 2)
    seen = through_lens(x, kernels)
    for image, kernel, mine in zip(x.numpy(), kernels.numpy(), seen.numpy(), strict=True):
        for axis, side in enumerate(size):
            pad = [(0, 0)] * 3
            pad[axis + 1] = (LENS_RADIUS, LENS_RADIUS)
            image = np.pad(image, pad, mode="reflect" if side > LENS_RADIUS else "edge")
        turned = kernel[::-1, ::-1]  # scipy's convolution turns it once more
        expected = [convolve(channel, turned, mode="constant")[6:-6, 6:-6] for channel in image]
        np.testing.assert_allclose(mine, np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (6, 7), (9, 4)])
def test_a_mosaic_is_interpolated_from_the_nearest_pixels_of_each_colour(size):
    x = noise(1, 3, *size)
    seen = mosaicked(x)[0]
    of = [[0, 1], [1, 2]]  # the colour of a pixel by the parity of its row and column
    height, width = size

    def at(place: int, side: int) -> int:
        return -place if place < 0 else 2 * side - 2 - place if place >= side else place

    for row in range(height):
        for column in range(width):
            for colour in range(3):
                near: dict[int, list[float]] = {0: [], 1: [], 2: []}
                for down in (-1, 0, 1):
                    for across in (-1, 0, 1):
                        if of[(row + down) % 2][(column + across) % 2] == colour:
                            place = at(row + down, height), at(column + across, width)
                            near[abs(down) + abs(across)].append(x[0, colour, *place].item())
                nearest = next(values for values in near.values() if values)
                assert seen[colour, row, column].item() == pytest.approx(np.mean(nearest), abs=1e-12)


MALVAR = {  # the filters of the paper's figure 2, times 8; their names say what is sought, and where
    "green at red or blue": [[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]],
    "red at green, in its row": [
        [0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0],
    ],
    "red at blue": [
        [0, 0, -1.5, 0, 0], [0, 2, 0, 2, 0], [-1.5, 0, 6, 0, -1.5], [0, 2, 0, 2, 0], [0, 0, -1.5, 0, 0],
    ],
}  # fmt: skip


@pytest.mark.parametrize("size", [(3, 3), (6, 7), (12, 9)])
def test_a_mosaic_is_interpolated_as_malvar_he_and_cutler_do(size):
    x = noise(1, 3, *size)
    height, width = size
    of = [[0, 1], [1, 2]]
    raw = np.array([[x[0, of[row % 2][column % 2], row, column] for column in range(width)] for row in range(height)])
    found = {name: convolve(raw, np.array(kernel) / 8, mode="mirror") for name, kernel in MALVAR.items()}
    in_column = convolve(raw, np.array(MALVAR["red at green, in its row"]).T / 8, mode="mirror")
    seen = (mosaicked(x) + gradient_correction(x))[0].numpy()
    for row in range(height):
        for column in range(width):
            here = of[row % 2][column % 2]
            for colour in range(3):
                if colour == here:
                    expected = raw[row, column]
                elif colour == 1:
                    expected = found["green at red or blue"][row, column]
                elif here == 1:
                    in_row = (row % 2 == 0) == (colour == 0)
                    expected = (found["red at green, in its row"] if in_row else in_column)[row, column]
                else:
                    expected = found["red at blue"][row, column]
                assert seen[colour, row, column] == pytest.approx(expected, abs=1e-12)


def test_grey_detail_comes_through_the_better_interpolation_whatever_the_white_balance():
    grey = photo(128).double().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    still = torch.zeros_like(grey)
    lost = [
        (through_sensor(grey, grey, still, sensor(1, power=1.0, mosaic=True, corrected=corrected))[2] - grey)
        .square()
        .mean()
        for corrected in (False, True)
    ]
    assert lost[1] < 0.5 * lost[0]


def sensor(count: int, **changed: float | bool) -> Sensor:
    plain = {"power": 2.2, "contrast": False, "red": 2.0, "blue": 1.5, "shot": 0.01, "read": 1e-4, "mosaic": False}
    plain |= {
        "luma": 0.0,
        "chroma": 0.0,
        "blotches": 1.0,
        "waves": 0.0,
        "sharpening": 0.0,
        "strength": 1.0,
        "corrected": False,
    }
    return Sensor(**{name: torch.full((count,), value) for name, value in (plain | changed).items()})


def test_the_noise_of_a_sensor_follows_the_light_and_its_gains():
    clean = torch.full((1, 3, 200, 200), 0.5, dtype=torch.float64)
    found, seen, target = through_sensor(clean, clean, noise(1, 3, 200, 200), sensor(1, shot=1e-3, read=1e-5))
    assert torch.equal(seen, clean)
    assert torch.equal(target, clean)
    light = 0.5**2.2
    for channel, gain in enumerate((2.0, 1.0, 1.5)):
        deviation = gain * math.sqrt(1e-3 * light / gain + 1e-5)  # in light after the gains
        slope = 0.5 ** (1 - 2.2) / 2.2  # of the tone curve there
        assert found[0, channel].std().item() == pytest.approx(deviation * slope, rel=0.03)
    darker = through_sensor(clean / 4, clean / 4, noise(1, 3, 200, 200), sensor(1, power=1.0))[0]
    assert darker.std() < through_sensor(clean, clean, noise(1, 3, 200, 200), sensor(1, power=1.0))[0].std()


def test_what_a_sensor_is_asked_to_restore():
    clean = photo(64).double()
    blurred = blur_each(clean, torch.tensor([1.0]))
    still = torch.zeros_like(clean)
    for contrast in (False, True):
        found, seen, target = through_sensor(clean, blurred, still, sensor(1, mosaic=True, contrast=contrast))
        assert found.abs().max() < 1e-12
        assert target.sub(clean).abs().mean() > 1e-3  # the mosaic's loss is not to be undone
        assert (target - clean).abs().mean() < (seen - clean).abs().mean()
        flat = torch.full_like(clean, 0.3)
        same = through_sensor(flat, flat, still, sensor(1, mosaic=True, contrast=contrast))
        for image in same[1:]:
            torch.testing.assert_close(image, flat, rtol=0, atol=1e-9)


def neighbours(x: torch.Tensor) -> float:
    """Correlation with the next pixel."""
    return (x[..., 1:] * x[..., :-1]).mean().item() / x.square().mean().item()


def test_cameras_smooth_the_noise_and_leave_blotches():
    clean = torch.full((1, 3, 128, 128), 0.5, dtype=torch.float64)
    normal = noise(1, 3, 128, 128)

    def luma_and_chroma(**changed: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = through_sensor(clean, clean, normal, sensor(1, red=1.0, blue=1.0, shot=1e-3, **changed))[0]
        luma = (found * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        return luma, found - luma

    luma, chroma = luma_and_chroma()
    softer, blotched = luma_and_chroma(luma=1.0, chroma=3.0, blotches=0.5)
    assert abs(neighbours(luma)) < 0.03
    assert neighbours(softer) > 0.7
    assert neighbours(blotched) > 0.95
    assert blotched.std().item() == pytest.approx(0.5 * chroma.std().item(), rel=0.25)
    assert luma_and_chroma(luma=1.0, sharpening=1.0)[0].std() > softer.std()
    assert luma_and_chroma(chroma=3.0, blotches=0.5, waves=0.5)[0].std() > luma.std()
    torch.testing.assert_close(luma_and_chroma(strength=1.5)[0], 1.5 * luma)


def test_grain_is_grey_and_strongest_in_the_middle():
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None, None, None].expand(5, 3, 80, 80)
    grain = film_grain(x, noise(5, 1, 80, 80), torch.full((5,), 0.05), torch.full((5,), 0.8))
    assert grain.shape == (5, 1, 80, 80)
    deviations = grain.std((1, 2, 3)).tolist()
    assert max(deviations[0], deviations[4]) < 1e-8
    assert deviations[2] == pytest.approx(0.05, rel=0.1)
    assert deviations[1] == pytest.approx(deviations[3], rel=0.15) == pytest.approx(0.05 * math.sqrt(0.75), rel=0.15)


def resampled(x: torch.Tensor, scale: float, kernel: str) -> torch.Tensor:
    batch, (height, width) = len(x), x.shape[-2:]
    numbers = torch.full((batch,), KERNELS.index(kernel))
    places = torch.zeros(batch, 2, dtype=torch.int64), torch.tensor([[height, width]]).expand(batch, -1)
    return down_and_up(x, torch.full((batch,), scale), numbers, *places)


@pytest.mark.parametrize("kernel", KERNELS)
def test_pictures_are_made_smaller_and_larger(kernel):
    x = noise(1, 3, 40, 60)
    torch.testing.assert_close(resampled(x, 1.0, kernel), x, rtol=0, atol=1e-12)
    flat = torch.full_like(x, 0.7)
    torch.testing.assert_close(resampled(flat, 1.37, kernel), flat, rtol=0, atol=1e-12)
    if kernel == "box":
        expected = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        torch.testing.assert_close(resampled(x, 2.0, kernel), expected, rtol=0, atol=1e-12)
        return
    mode = {"triangle": "bilinear", "bicubic": "bicubic"}[kernel]
    for scale, small in ((2.0, (20, 30)), (1.7, (24, 35))):
        smaller = F.interpolate(x, size=small, mode=mode, align_corners=False, antialias=True)
        expected = F.interpolate(smaller, size=(40, 60), mode=mode, align_corners=False, antialias=True)
        inner = (..., slice(10, -10), slice(10, -10))  # PyTorch leaves out what lies beyond borders
        torch.testing.assert_close(resampled(x, scale, kernel)[inner], expected[inner], rtol=0, atol=1e-10)


def test_the_chain_is_mild_and_off_for_some():
    clean, count = photo(48), 200
    y, target = create_degradation("real").pair(
        clean.expand(count, -1, -1, -1), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(y, (y * 255).round() / 255)
    assert y.min() >= 0
    assert y.max() <= 1
    untouched = (y == clean).flatten(1).all(1)
    assert 0.07 < untouched.float().mean() < 0.22
    same_target = (target == clean).flatten(1).all(1)
    assert same_target[untouched].all()
    assert 0.4 < same_target.float().mean() < 0.7  # 1 - 0.88 x 0.75 x 0.7
    quality = -10 * (y - target).square().mean((1, 2, 3))[~untouched].log10()
    assert 27 < quality.median() < 34
    assert quality.min() > 15


def test_what_is_evaluated_is_what_can_be_restored():
    lost = RealDegradation("lost", damage=lambda clean, _: (clean / 2, clean / 2))
    assert torch.equal(lost(torch.ones(1, 3, 4, 4), generator=torch.Generator()), torch.full((1, 3, 4, 4), 0.5))
    row, given, _ = evaluate_image(torch.nn.Identity(), photo(32), lost, index=0)
    assert row["psnr"] == row["input_psnr"] == math.inf
    assert torch.equal(given, photo(32) / 2)
    plain = dataclasses.replace(create_degradation("deblur"), operator=torch.clone, sigma=0.0)
    assert torch.equal(plain.pair(given, generator=torch.Generator())[1], given)


def test_jpeg_keeps_chroma_where_it_is_told_to():
    x = photo(40).expand(2, -1, -1, -1)
    qualities = torch.tensor([90, 90])
    halved, full = through_jpeg(x, qualities, torch.tensor([False, True]))
    assert torch.equal(halved, through_jpeg(x, qualities)[0])
    assert (full - x[0]).abs().mean() < (halved - x[0]).abs().mean()
