"""One property test for every degradation, and each operator against a reference that shares no code with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve

from serpent_ir import degradations
from serpent_ir.degradations import DEGRADATIONS, create_degradation, evaluation_generator, gaussian_blur
from serpent_ir.errors import UsageError


def random_image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_properties(name, dtype):
    degradation = create_degradation(name)
    A = degradation.operator
    scale = degradation.scale
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-14}
    global_state = torch.get_rng_state()

    clean = degradation.crop(random_image(3, 3, 83, 50, dtype=dtype))
    H, W = 83 // scale * scale, 50 // scale * scale
    assert clean.shape == (3, 3, H, W)
    before = clean.clone()
    y = degradation(clean, generator=torch.Generator().manual_seed(1))
    assert degradation.name == name
    assert y.shape == (3, 3, H // scale, W // scale)
    assert y.dtype == dtype
    assert degradation.network_input(y).shape == clean.shape
    assert degradation.network_input(y).dtype == dtype
    assert torch.equal(clean, before)

    # Noise: a function of the generator's seed alone.
    assert torch.equal(y, degradation(clean, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(y, degradation(clean, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(global_state, torch.get_rng_state())

    # A: batch equals singles, linear, keeps constants (and so the range's ends), and has no preferred direction.
    degraded = A(clean)
    torch.testing.assert_close(degraded, torch.cat([A(one) for one in clean.split(1)]), **tolerance)
    other = random_image(*clean.shape, dtype=dtype, seed=9)
    torch.testing.assert_close(A(0.3 * clean - 2 * other), 0.3 * degraded - 2 * A(other), **tolerance)
    torch.testing.assert_close(A(torch.full_like(clean, 0.7)), torch.full_like(degraded, 0.7), **tolerance)
    for axes in ((-1,), (-2,), (-1, -2)):
        torch.testing.assert_close(A(clean.flip(axes)), degraded.flip(axes), **tolerance)
    torch.testing.assert_close(A(clean.transpose(-1, -2)), degraded.transpose(-1, -2), **tolerance)
    strided = clean.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels-last memory
    torch.testing.assert_close(A(strided), degraded, **tolerance)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_noise_is_white_with_the_stated_deviation(name):
    degradation = create_degradation(name)
    clean = torch.full((2, 3, 256, 256), 0.5)
    noise = degradation(clean, generator=evaluation_generator(0, 0)) - degradation.operator(clean)
    sample = noise.double().flatten()
    standard_error = degradation.sigma / sample.numel() ** 0.5
    assert abs(sample.mean()) < 5 * standard_error
    assert abs(sample.std() - degradation.sigma) < 5 * standard_error
    for shift in ((0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)):
        shifted = noise.roll(shift, dims=(0, 1, 2, 3)).double()
        assert abs((noise * shifted).mean()) < 5 * degradation.sigma * standard_error
    dark = degradation(torch.zeros_like(clean), generator=evaluation_generator(0, 1))
    assert (dark < 0).float().mean() == pytest.approx(0.5, abs=0.05)  # not clamped


def dense_blur(image: np.ndarray) -> np.ndarray:
    """The blur of one (H, W) channel as an explicit 61x61 convolution in float64."""
    offsets = np.arange(-30, 31)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 3.0**2))
    for axis, side in enumerate(image.shape):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (30, 30)
        image = np.pad(image, pad, mode="reflect" if side >= 31 else "edge")
    return convolve(image, kernel / kernel.sum(), mode="constant")[30:-30, 30:-30]


@pytest.mark.parametrize("blur_rows", ["_blur_rows_by_blocks", "_blur_rows_by_convolution"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (30, 31), (31, 30), (31, 31), (64, 32), (65, 29), (129, 31)])
def test_deblur_matches_a_dense_convolution(size, blur_rows, monkeypatch):
    monkeypatch.setattr(degradations, "_blur_rows_by_blocks", getattr(degradations, blur_rows))
    clean = random_image(1, 2, *size, dtype=torch.float64)
    expected = torch.from_numpy(np.stack([[dense_blur(c) for c in image] for image in clean.numpy()]))
    torch.testing.assert_close(gaussian_blur(clean), expected, rtol=0, atol=1e-13)  # 3721 roundings
    torch.testing.assert_close(gaussian_blur(clean.float()), expected.float(), rtol=0, atol=1e-6)


def test_deblur_is_exact_under_autocast_and_differentiable_after_inference_mode():
    degradations._kernel.cache_clear()
    degradations._band.cache_clear()
    clean = random_image(1, 3, 40, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        blurred = gaussian_blur(clean)
    assert blurred.dtype == torch.float32
    leaf = clean.clone().requires_grad_()
    again = gaussian_blur(leaf)
    assert torch.equal(again, blurred)
    (gradient,) = torch.autograd.grad(again.sum(), leaf)
    assert gradient.sum().item() == pytest.approx(clean.numel(), rel=1e-5)


def bicubic_weights(n: int) -> np.ndarray:
    """(n / 8, n): antialiased bicubic interpolation (a = -0.5, Keys 1981) as a matrix, the border renormalised."""
    x = np.abs((np.arange(n)[None, :] + 0.5 - 8 * (np.arange(n // 8)[:, None] + 0.5)) / 8)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (96, 8)])
def test_sr8_matches_an_explicit_matrix(size):
    clean = random_image(2, 3, *size, dtype=torch.float64)
    rows, columns = (torch.from_numpy(bicubic_weights(n)) for n in size)
    torch.testing.assert_close(create_degradation("sr8").operator(clean), rows @ clean @ columns.T, rtol=0, atol=1e-12)


def test_sr8_network_input_is_bicubic():
    y = random_image(1, 3, 4, 5)
    expected = F.interpolate(y, size=(32, 40), mode="bicubic", align_corners=False)
    assert torch.equal(create_degradation("sr8").network_input(y), expected)
    assert create_degradation("deblur").network_input(y) is y


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (0, 8), (12, 16), (16, 12)])
def test_sr8_refuses_other_sizes(size):
    degradation = create_degradation("sr8")
    with pytest.raises(UsageError, match=f"{size[1]}x{size[0]} px"):
        degradation.operator(torch.zeros(1, 3, *size))
    if min(size) < 8:
        with pytest.raises(UsageError, match="at least 8 px"):
            degradation.crop(torch.zeros(1, 3, *size))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'blur'.*deblur, sr8"):
        create_degradation("blur")


def test_evaluation_generator_depends_on_seed_and_index_only():
    def draw(seed: int, index: int) -> torch.Tensor:
        return torch.randn(16, generator=evaluation_generator(seed, index))

    torch.manual_seed(3)
    first = draw(0, 5)
    torch.manual_seed(4)
    assert torch.equal(first, draw(0, 5))
    draws = torch.stack([draw(seed, index) for seed in range(8) for index in range(250)])
    assert len(torch.unique(draws, dim=0)) == 2000
    with pytest.raises(UsageError):
        evaluation_generator(-1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_gpu_equals_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    degradation = create_degradation(name)
    clean = random_image(4, 3, 136, 72)
    on_cpu = degradation(clean, generator=evaluation_generator(0, 0))
    on_gpu = degradation(clean.cuda(), generator=evaluation_generator(0, 0))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-6)
    upsampled = degradation.network_input(on_gpu).cpu()
    torch.testing.assert_close(upsampled, degradation.network_input(on_cpu), rtol=0, atol=4e-6)
