"""One property test for every degradation, and each operator against a reference that shares no code with it."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import convolve, convolve1d
from skimage import data

from serpent_ir.degradations import (
    DEGRADATIONS,
    LinearDegradation,
    add_noise,
    blur,
    blur_each,
    create_degradation,
    draw_holes,
    erase,
    evaluation_generator,
    gaussian_blur,
    through_jpeg,
)
from serpent_ir.errors import UsageError


def random_image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LINEAR = [name for name, degradation in DEGRADATIONS.items() if isinstance(degradation, LinearDegradation)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_properties(name, dtype):
    degradation = create_degradation(name)
    scale = degradation.scale
    global_state = torch.get_rng_state()
    for size in [(83, 50), (1, 1), (scale, 9), (30, scale)]:
        whole = random_image(3, 3, *size, dtype=dtype)
        if min(size) < scale:
            continue
        clean = degradation.crop(whole)
        H, W = (side // scale * scale for side in size)
        assert clean.shape == (3, 3, H, W)
        before = clean.clone()
        y = degradation(clean, generator=torch.Generator().manual_seed(1))
        assert degradation.name == name
        assert y.shape == (3, degradation.channels, H // scale, W // scale)
        assert y.dtype == dtype
        assert y.isfinite().all()
        given = degradation.network_input(y)
        own = degradation.network_scale
        assert given.shape == (3, degradation.channels, H // own, W // own)
        assert given.dtype == dtype
        assert degradation.before(given).shape == clean.shape
        assert degradation.combine(clean, given).shape == clean.shape
        assert torch.equal(clean, before)

        # A function of the generator's seed alone, and no view of the image.
        assert torch.equal(y, degradation(clean, generator=torch.Generator().manual_seed(1)))
        if H > 40 and name not in ("sr2", "sr4"):
            assert not torch.equal(y, degradation(clean, generator=torch.Generator().manual_seed(2)))
        strided = clean.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels-last memory
        again = degradation(strided, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(again, y, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)
        y.zero_()
        assert torch.equal(clean, before)
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LINEAR)
def test_operators_are_linear(name, dtype):
    degradation = create_degradation(name)
    A = degradation.operator
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-14}
    clean = degradation.crop(random_image(3, 3, 83, 50, dtype=dtype))
    # A: batch equals singles, linear, keeps constants (and so the range's ends), and has no preferred direction.
    degraded = A(clean)
    torch.testing.assert_close(degraded, torch.cat([A(one) for one in clean.split(1)]), **tolerance)
    other = random_image(*clean.shape, dtype=dtype, seed=9)
    torch.testing.assert_close(A(0.3 * clean - 2 * other), 0.3 * degraded - 2 * A(other), **tolerance)
    torch.testing.assert_close(A(torch.full_like(clean, 0.7)), torch.full_like(degraded, 0.7), **tolerance)
    for axes in ((-1,), (-2,), (-1, -2)):
        torch.testing.assert_close(A(clean.flip(axes)), degraded.flip(axes), **tolerance)
    torch.testing.assert_close(A(clean.transpose(-1, -2)), degraded.transpose(-1, -2), **tolerance)


@pytest.mark.parametrize("name", LINEAR)
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
    monkeypatch.setattr(blur, "_blur_rows_by_blocks", getattr(blur, blur_rows))
    clean = random_image(1, 2, *size, dtype=torch.float64)
    expected = torch.from_numpy(np.stack([[dense_blur(c) for c in image] for image in clean.numpy()]))
    torch.testing.assert_close(gaussian_blur(clean), expected, rtol=0, atol=1e-13)  # 3721 roundings
    torch.testing.assert_close(gaussian_blur(clean.float()), expected.float(), rtol=0, atol=1e-6)


def test_deblur_is_exact_under_autocast_and_differentiable_after_inference_mode():
    blur._kernel.cache_clear()
    blur._band.cache_clear()
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


def sharpness(image: torch.Tensor) -> torch.Tensor:
    return (image[..., 1:] - image[..., :-1]).abs().mean((1, 2, 3))


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (40, 26)])
def test_each_image_gets_its_own_blur(size):
    clean = random_image(4, 3, *size, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.4, 1.5, 3.0])
    blurred = blur_each(clean, sigma)
    assert torch.equal(blurred[0], clean[0])  # none, exactly
    for i in range(1, 4):
        offsets = np.arange(-12, 13)
        kernel = np.exp(-0.5 * (offsets / np.float64(sigma[i])) ** 2)
        expected = clean[i].numpy()
        for axis in (1, 2):
            mode = "mirror" if expected.shape[axis] > 12 else "nearest"
            expected = convolve1d(expected, kernel / kernel.sum(), axis=axis, mode=mode)
        torch.testing.assert_close(blurred[i], torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_noise_is_as_strong_as_drawn():
    flat = torch.full((3, 3, 200, 200), 0.5)
    noisy = add_noise(flat, torch.tensor([0.0, 0.02, 0.2]), torch.Generator().manual_seed(0))
    assert torch.equal(noisy[0], flat[0])
    assert (noisy - flat).std((1, 2, 3))[1:].tolist() == pytest.approx([0.02, 0.2], rel=0.02)
    drawn = create_degradation("denoise")(torch.zeros(400, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    strengths = drawn.std((1, 2, 3)) * 255
    assert 4.5 < strengths.min() < 7
    assert 47 < strengths.max() < 54
    assert strengths.mean().item() == pytest.approx(27.5, rel=0.1)


def through_libjpeg(image: np.ndarray, quality: int, subsampling: str = "4:2:0") -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("full_chroma", [False, True])
@pytest.mark.parametrize("size", [(512, 512), (333, 477), (17, 19), (1, 30), (9, 1), (1, 1)])
def test_jpeg_is_what_libjpeg_does(size, full_chroma):
    photo = data.astronaut()[: size[0], : size[1]]
    qualities = [5, 30, 50, 75, 90, 100]
    x = torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255
    full = torch.full((len(qualities),), full_chroma)
    ours = through_jpeg(x.expand(len(qualities), *x.shape), torch.tensor(qualities), full)
    levels = (ours * 255).round()
    assert torch.equal(levels / 255, ours)  # 8-bit levels
    for quality, mine in zip(qualities, levels.permute(0, 2, 3, 1).numpy().astype(int), strict=True):
        theirs = through_libjpeg(photo, quality, "4:4:4" if full_chroma else "4:2:0").astype(int)
        lost = np.abs(theirs - photo).mean()
        # libjpeg's transforms round to integers on the way, so that a few coefficients fall to the other side.
        assert np.abs(mine - theirs).mean() <= 0.25 * lost + (0.2 if full_chroma else 0.1)
        assert np.mean(np.abs(mine - theirs) > 1) < (0.1 if min(size) > 100 else 0.3)


@pytest.mark.parametrize("size", [(506, 256), (250, 64), (8, 8), (50, 4), (7, 2), (33, 3)])
def test_jpeg_of_sides_that_are_no_whole_blocks_is_libjpegs_up_to_their_last_row(size):
    """Noise shows what is repeated where blocks are not full: a wrong row there is wrong by many levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    mine = (through_jpeg(x, torch.tensor([10])) * 255).round()[0].permute(1, 2, 0).numpy()
    differ = np.abs(mine - through_libjpeg(pixels, 10))
    assert differ[-8:].mean() < 2  # a coefficient or two fall to the other side; wrong rows differ by 6 to 13
    assert through_jpeg(x[:0], torch.tensor([], dtype=torch.int64)).shape == (0, *x.shape[1:])


def test_photo_ranges_from_untouched_to_all_three():
    clean = torch.from_numpy(data.astronaut()[:64, :64].copy()).permute(2, 0, 1).float()[None] / 255
    count = 600
    y = create_degradation("photo")(clean.expand(count, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    untouched = (y == clean).flatten(1).all(1)
    assert 0.3**3 / 3 < untouched.float().mean() < 0.3**3 * 3
    eight_bits = ((y * 255 - (y * 255).round()).abs() < 1e-3).flatten(1).all(1)
    assert eight_bits.float().mean().item() == pytest.approx(0.7 + 0.3**3, abs=0.06)
    assert (sharpness(y) < 0.6 * sharpness(clean)).any()
    assert (sharpness(y) > 1.5 * sharpness(clean)).any()
    assert (y - clean).square().mean((1, 2, 3)).max() < 0.02  # mild: 17 dB at the worst


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (97, 64), (128, 128)])
def test_holes(size):
    masks = draw_holes(200, *size, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert masks.shape == (200, 1, *size)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    if min(size) > 10:
        share = masks.mean((1, 2, 3))
        assert 0.02 < share.mean() < 0.25
        assert share.max() < 0.7
        assert (share > 0).float().mean() > 0.9  # a stroke may leave the image
    clean = random_image(200, 3, *size)
    y = erase(clean, masks)
    assert torch.equal(y[:, :3], clean * (1 - masks))
    assert torch.equal(y[:, 3:], masks)
    combined = create_degradation("inpaint").combine(torch.full_like(clean, 2.0), y)
    assert torch.equal(combined, torch.where(masks > 0, 2.0, clean))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'blur'.*deblur, sr8.*photo"):
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
    if name in ("photo", "real"):  # the last bits of a blur decide now and then which level JPEG rounds to
        assert ((on_gpu.cpu() - on_cpu).abs() < 2e-6).float().mean() > 0.99
        return
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-6)
    upsampled = degradation.network_input(on_gpu).cpu()
    torch.testing.assert_close(upsampled, degradation.network_input(on_cpu), rtol=0, atol=4e-6)
