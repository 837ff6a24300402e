"""PSNR and SSIM against their formulas written out in float64, and against scikit-image; LPIPS against torchmetrics."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from skimage import data
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio as peak_snr
from skimage.metrics import structural_similarity
from torch import nn
from torchmetrics.functional.image import lpips as theirs
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from serpent_ir import metrics
from serpent_ir.degradations import blur_each
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.metrics import Brisque, Lpips, eight_bits, psnr, ssim


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth clean batch with flat areas, and a restored one that also leaves [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    clean = (0.5 + 0.6 * torch.sin(rows / 7) * torch.cos(columns / 5)).clamp(0, 1).expand(shape).clone()
    return clean + 0.05 * torch.randn(shape, generator=generator), clean


def rounded(image: torch.Tensor) -> np.ndarray:
    return np.round(np.clip(image.double().numpy(), 0, 1) * 255) / 255


def ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM of two (H, W) channels by the definition: every 11x11 window, reflected at the border."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (np.lib.stride_tricks.sliding_window_view(np.pad(a, 5, mode="reflect"), (11, 11)) for a in (x, y))
    mean_x, mean_y = ((window * a).sum((-1, -2), keepdims=True) for a in (x, y))
    variance_x, variance_y = (window * (x - mean_x) ** 2).sum((-1, -2)), (window * (y - mean_y) ** 2).sum((-1, -2))
    covariance = (window * (x - mean_x) * (y - mean_y)).sum((-1, -2))
    mean_x, mean_y = mean_x[..., 0, 0], mean_y[..., 0, 0]
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)


def test_psnr_is_its_formula():
    restored, clean = pair(3, 3, 20, 33)
    error = np.mean((rounded(restored) - rounded(clean)) ** 2, axis=(1, 2, 3))
    values = psnr(restored, clean)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), -10 * np.log10(error), rtol=1e-13)
    for value, a, b in zip(values, eight_bits(restored), eight_bits(clean), strict=True):
        assert value.item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0).item(), rel=1e-6)


@pytest.mark.parametrize("size", [(11, 11), (23, 12), (40, 31)])
@pytest.mark.parametrize("strip", [1, 16, 512])
def test_ssim_is_its_formula(size, strip, monkeypatch):
    monkeypatch.setattr(metrics, "_STRIP", strip)
    restored, clean = pair(2, 3, *size)
    maps = [[ssim_map(a, b) for a, b in zip(*images, strict=True)] for images in zip(rounded(restored), rounded(clean))]  # noqa: B905
    values = ssim(restored, clean)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), np.mean(maps, axis=(1, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize("size", [(11, 30), (130, 57), (300, 64)])
def test_ssim_is_that_of_torchmetrics(size):
    restored, clean = pair(1, 3, *size)
    _, similarity = structural_similarity_index_measure(
        eight_bits(restored), eight_bits(clean), data_range=1.0, return_full_image=True
    )
    assert ssim(restored, clean).item() == pytest.approx(similarity.mean().item(), rel=1e-10)


PEAK = """
import resource, sys, torch
from serpent_ir import metrics
restored, clean = torch.rand(2, 1, 3, 512, 512)
metric = getattr(metrics, sys.argv[1])
metric(restored[..., :16, :16], clean[..., :16, :16])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
metric(restored, clean)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_figures_take_little_memory(metric):
    """Images of 6 MB; PyTorch's float64 convolution unfolded every window, 1.3 GB."""
    done = subprocess.run([sys.executable, "-c", PEAK, metric], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000


def test_ssim_is_that_of_scikit_image_but_for_the_border():
    restored, clean = (rounded(image)[0, 0] for image in pair(1, 1, 48, 64))
    theirs, their_map = structural_similarity(  # pyright: ignore[reportAssignmentType]
        restored, clean, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True
    )
    ours = ssim_map(restored, clean)
    np.testing.assert_allclose(ours[5:-5, 5:-5], their_map[5:-5, 5:-5], rtol=1e-9)
    assert theirs == pytest.approx(ours[5:-5, 5:-5].mean(), rel=1e-9)  # scikit-image leaves the border out of its mean
    assert theirs == pytest.approx(ours.mean(), abs=0.02)


def test_protocols_are_those_of_scikit_image_on_what_they_compare():
    restored, clean = pair(1, 3, 61, 45, seed=3)
    a, b = (rounded(image)[0].transpose(1, 2, 0) for image in (restored, clean))
    luma = [rgb2ycbcr(image)[..., 0] for image in (a, b)]  # 16 to 235

    def expected(x: np.ndarray, y: np.ndarray, full: float, border: int) -> tuple[float, float]:
        inner = slice(border, x.shape[0] - border), slice(border, x.shape[1] - border)
        x, y = x[inner], y[inner]
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        axis = 2 if x.ndim == 3 else None
        similarity = structural_similarity(x, y, data_range=full, channel_axis=axis, **gaussian)
        return peak_snr(x, y, data_range=full), similarity

    for name, scale, values in (
        ("sr", 3, expected(*luma, 255, 3)),
        ("sr", 4, expected(*luma, 255, 4)),
        ("denoise", 1, expected(a, b, 1, 0)),
        ("jpeg", 1, expected(*luma, 255, 0)),
        ("ntire-esr", 4, expected(a, b, 1, 4)),
    ):
        assert psnr(restored, clean, name, scale=scale).item() == pytest.approx(values[0], abs=1e-6)
        assert ssim(restored, clean, name, scale=scale).item() == pytest.approx(values[1], abs=1e-6)
    assert psnr(restored, clean, "denoise") == psnr(restored, clean)
    with pytest.raises(UsageError, match="unknown protocol 'y'; the known ones are rgb, sr, denoise, jpeg, ntire-esr"):
        psnr(restored, clean, "y")
    with pytest.raises(UsageError, match="nothing is left of 8x8 px within a border of 4"):
        psnr(restored[..., :8, :8], clean[..., :8, :8], "ntire-esr")


def test_identical_images():
    _, clean = pair(2, 3, 16, 16)
    clean = (clean * 255).round() / 255
    almost = clean + 1e-3 * (clean < 0.5)  # the same file once rounded
    for restored in (clean, almost):
        assert torch.equal(psnr(restored, clean), torch.full((2,), torch.inf, dtype=torch.float64))
        torch.testing.assert_close(ssim(restored, clean), torch.ones(2, dtype=torch.float64))


def test_values_are_per_image_and_symmetric_and_blind_to_dtype():
    restored, clean = pair(3, 3, 24, 24)
    for metric in (psnr, ssim):
        batch = metric(restored, clean)
        singles = torch.cat([metric(a, b) for a, b in zip(restored.split(1), clean.split(1), strict=True)])
        torch.testing.assert_close(batch, singles, rtol=1e-12, atol=0)
        torch.testing.assert_close(batch, metric(clean, restored), rtol=1e-12, atol=0)
        torch.testing.assert_close(batch, metric(restored.double(), clean), rtol=1e-12, atol=0)


def test_nan_is_not_hidden():
    restored, clean = pair(2, 3, 16, 16)
    restored[0, 0, 0, 0] = torch.nan
    for metric in (psnr, ssim):
        values = metric(restored, clean)
        assert values[0].isnan()
        assert values[1].isfinite()


def test_eight_bits():
    levels = torch.arange(256) / 255
    assert torch.equal(eight_bits(levels + 0.001), torch.arange(256).double() / 255)
    assert eight_bits(torch.tensor([-1.0, 2.0])).tolist() == [0, 1]


def test_errors():
    for metric in (psnr, ssim):  # whose values would all be clamped to 1
        with pytest.raises(UsageError, match=r"got torch.uint8 and torch.uint8: divide by 255"):
            metric(*torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UsageError, match="at least 11x11 px; this one is 30x10 px"):
        ssim(torch.zeros(1, 3, 10, 30), torch.zeros(1, 3, 10, 30))
    for metric in (psnr, ssim):
        with pytest.raises(UsageError, match="one shape"):
            metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))


def test_import_is_light():
    code = "import sys, serpent_ir.metrics; print({'torchmetrics', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    restored, clean = pair(2, 3, 96, 80)
    for metric in (psnr, ssim):
        torch.testing.assert_close(
            metric(restored.cuda(), clean.cuda()).cpu(), metric(restored, clean), rtol=1e-9, atol=0
        )


def backbone(name: str) -> nn.Sequential:
    """The convolutional part of torchvision's AlexNet or VGG-16, which is not installed here."""
    if name == "alex":
        shapes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        pooled, window = {0, 1, 4}, 3
    else:
        widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
        shapes = [(a, b, 3, 1, 1) for a, b in itertools.pairwise(widths)]
        pooled, window = {1, 3, 6, 9, 12}, 2
    layers = []
    for i, (a, b, size, stride, padding) in enumerate(shapes):
        layers += [nn.Conv2d(a, b, size, stride, padding), nn.ReLU()]
        if i in pooled:
            layers.append(nn.MaxPool2d(window, 2))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics(name, tmp_path, monkeypatch):
    """With random weights of the backbone: those for ImageNet are not here."""
    torch.manual_seed(0)
    features = backbone(name)
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, tmp_path / "weights.pth")
    lpips = Lpips(tmp_path / "weights.pth", torch.device("cpu"))
    restored, clean = pair(2, 3, 70, 96)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
    reference = theirs._LPIPS(pretrained=True, net=name, pnet_rand=True).eval()
    wanted = reference(eight_bits(restored).float(), eight_bits(clean).float(), normalize=True).flatten().double()
    torch.testing.assert_close(lpips(restored, clean), wanted, rtol=1e-5, atol=1e-7)
    assert lpips(clean, clean).tolist() == [0, 0]
    with pytest.raises(UsageError, match="64x64"):
        lpips(clean[..., :63], clean[..., :63])


def test_lpips_refuses_other_files(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.pth")
    for name in ("text.pth", "part.pth", "none.pth"):
        with pytest.raises(SerpentError, match=rf"{name}: (not torchvision's AlexNet|no such)"):
            Lpips(tmp_path / name, torch.device("cpu"))


def test_brisque_is_that_of_its_package():
    """The figures are those of brisque 0.2.0 itself beside NumPy 2.3.5: beside 2.4 it gives none (findings)."""
    pytest.importorskip("brisque", reason="its library in C++ was not built: there was no compiler")
    brisque = Brisque()
    image = torch.from_numpy(data.astronaut()).movedim(-1, 0)[None] / 255
    noisy = image + 25 / 255 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    blurred = blur_each(image, torch.tensor([3.0]))
    found = brisque(torch.cat([image, image.double().float() + 0.4 / 255, noisy, blurred]))
    assert found.dtype == torch.float64
    assert found[0].item() == pytest.approx(10.7948629, abs=1e-5)
    assert found[1] == found[0]  # rounds away
    assert found[2] > 40
    assert found[3] > 60
    assert brisque(torch.full((1, 3, 48, 48), 0.5)).isnan().all()


def test_brisque_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "brisque", None)
    with pytest.raises(UsageError, match=r"pip install 'serpent-ir\[brisque\]'"):
        Brisque()
