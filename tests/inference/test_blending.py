"""Strength, protection and auto: what of a network's change comes into the result."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

from networks import small_network
from serpent_ir import Restorer, restore
from serpent_ir.degradations import blur_each
from serpent_ir.errors import UsageError
from serpent_ir.files import source as streaming
from serpent_ir.image import read_image, to_tensor
from serpent_ir.inference import auto
from serpent_ir.inference.blending import FEATHER, Blend, blended


def photo(height: int, width: int, top: int = 20) -> Tensor:
    return to_tensor(data.astronaut()[top : top + height, 100 : 100 + width].copy())


def noise(shape: torch.Size, sigma: float, seed: int = 0) -> Tensor:
    return sigma * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    return x.clamp(0, 1).mul(255).round().div(255)


def judged(before: Tensor, after: Tensor) -> Tensor:
    return auto.shares(auto.moments(before, after))


@pytest.mark.parametrize("sigma", [4, 10])
def test_what_removes_noise_is_believed(sigma):
    clean = photo(200, 250)
    noisy = rounded(clean + noise(clean.shape, sigma / 255))
    share = judged(noisy, clean)
    assert share.shape == (1, 1, 13, 16)
    assert share.mean() > 0.8
    assert share.min() > 0.3


def test_what_changes_a_picture_without_damage_is_not():
    clean = photo(200, 250)
    assert (judged(clean, clean) == 0).all()
    assert (judged(clean, clean + noise(clean.shape, 0.15 / 255)) == 0).all()  # rounds away
    dots = torch.zeros_like(clean)
    dots[..., 64:128:2, 64:128:2] = torch.tensor([0.2, -0.1, 0.15])[:, None, None]
    assert judged(clean, clean + dots)[..., 4:8, 4:8].mean() < 0.1  # a pattern in one place


def test_detail_and_moments_are_those_of_their_definitions():
    x, change = noise(torch.Size([1, 3, 37, 50]), 0.2, 1).double(), noise(torch.Size([1, 3, 37, 50]), 0.1, 2).double()
    found = auto.moments(x, x + change)[0].numpy()
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    d = change[0].numpy()
    luma = (weights * d).sum(0)

    def detail(plane: np.ndarray) -> np.ndarray:
        p = np.pad(plane, 1, mode="edge")
        kernel = np.outer([-1, 2, -1], [-1, 2, -1]) / 6
        return sum(kernel[i, j] * p[i : i + plane.shape[0], j : j + plane.shape[1]] for i in range(3) for j in range(3))

    p = np.pad(luma, ((0, 1), (0, 1)), mode="edge")
    colour = x[0].numpy() - (weights * x[0].numpy()).sum(0)
    maps = [
        luma**2,
        ((d - luma) ** 2).mean(0),
        luma * (p[1:, :-1] + p[:-1, 1:]) / 2,
        detail((weights * (x + change)[0].numpy()).sum(0)) ** 2,
        np.mean([detail(plane) ** 2 for plane in colour], 0),
    ]
    assert found.shape == (5, 3, 4)
    for plane, cells in zip(maps, found, strict=True):
        for row in range(3):
            for column in range(4):
                cell = plane[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert cells[row, column] == pytest.approx(cell.mean(), rel=1e-9, abs=1e-15)
    white = auto._detail(noise(torch.Size([1, 1, 400, 400]), 1.0))
    assert white.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("cuts", [(300,), (17, 40, 100, 300), (160, 161, 300), tuple(range(10, 301, 10))])
def test_however_an_image_is_cut_it_is_blended_alike(cuts):
    before = photo(300, 90).repeat(2, 1, 1, 1)
    before[1] = rounded(before[1] + noise(before[1].shape, 0.03))
    after = blur_each(before, torch.tensor([0.7, 1.2])).clamp(0, 1)
    protection = torch.zeros(1, 1, 300, 90)
    protection[..., 50:120, :40] = 1
    told: list[Tensor] = []

    def all_of(ends: tuple[int, ...]) -> Tensor:
        starts = (0, *ends[:-1])
        strips = [after[:, :, a:b].clone() for a, b in zip(starts, ends, strict=True)]
        parts = blended(strips, lambda rows: before[:, :, slice(*rows)], 300, Blend(0.9, True, protection, told.append))
        return torch.cat(list(parts), 2)

    whole, cut = all_of((300,)), all_of(cuts)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)
    assert torch.equal(told[0], told[1])
    share = auto.to_pixels(judged(before, after), 300, 90)
    expected = before + 0.9 * share * (1 - protection) * (after - before)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)


class Darker(nn.Module):
    """A network of a known answer."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def test_strength_goes_from_the_input_to_beyond_the_result():
    image = (photo(40, 50)[0].movedim(0, -1) * 255).byte().numpy()
    for strength in (0.0, 0.25, 1.0, 1.5):
        found = restore(image, Darker(), strength=strength)
        assert np.abs(found - image * (1 - 0.5 * strength)).max() <= 0.51
    assert np.array_equal(restore(image, Darker(), strength=0), image)
    x = photo(40, 50).double() * 0.999
    torch.testing.assert_close(restore(x, Darker(), strength=0.5), x * 0.75, rtol=0, atol=1e-6)
    for wrong in (-0.1, 1.6, float("nan")):
        with pytest.raises(UsageError, match=r"strength of .*; it must be from 0 to 1\.5"):
            Restorer(Darker(), strength=wrong)


class Larger(nn.Module):
    scale = 2

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


def test_networks_that_enlarge_are_blended_with_the_bicubic_enlargement():
    x = photo(30, 20)
    bicubic = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)
    torch.testing.assert_close(restore(x, Larger(), strength=0), bicubic, rtol=0, atol=1e-6)
    half = restore(x, Larger(), strength=0.5)
    torch.testing.assert_close(half, ((bicubic + Larger()(x)) / 2).clamp(0, 1), rtol=0, atol=0.01)  # bicubic overshoots
    mask = torch.zeros(30, 20)
    mask[:, :10] = 1
    kept = restore(x, Larger(), protect=mask)
    torch.testing.assert_close(kept[..., :20], bicubic[..., :20], rtol=0, atol=1e-6)
    assert torch.equal(kept[..., 20 + 2 * FEATHER :], Larger()(x)[..., 20 + 2 * FEATHER :])
    with pytest.raises(UsageError, match="auto is for networks that keep the size"):
        Restorer(Larger(), auto=True)


def test_what_is_protected_stays_and_its_rim_is_soft():
    image = np.full((60, 70, 3), 200, np.uint8)
    mask = np.zeros((60, 70), np.uint8)
    mask[20:40, 10:30] = 255
    found = restore(image, Darker(), protect=mask)
    assert (found[20:40, 10:30] == 200).all()
    assert (found[:, 30 + 2 * FEATHER :] == 100).all()
    rim = found[30, 30 : 31 + 2 * FEATHER, 0].astype(int)
    assert (np.diff(rim) <= 0).all()
    assert np.diff(rim).min() > -20  # no step: from 200 to 100 in 8 pixels
    assert (restore(image, Darker(), protect=mask > 0) == found).all()
    grey = restore(image, Darker(), protect=np.full((60, 70), 0.5))
    assert np.abs(grey.astype(int) - 150).max() <= 1
    with pytest.raises(UsageError, match="the mask is 70x61 px and the image 70x60"):
        restore(image, Darker(), protect=np.zeros((61, 70)))


def test_auto_is_for_photo_unless_asked():
    assert Restorer(small_network("photo")).auto
    assert not Restorer(small_network("photo"), auto=False).auto
    assert not Restorer(small_network("deblur")).auto
    assert Restorer(small_network("deblur"), auto=True).auto


def test_rows_of_a_large_tiff_are_judged_as_the_whole_is(tmp_path, monkeypatch):
    import tifffile

    noisy = rounded(photo(180, 150) + noise(torch.Size([1, 3, 180, 150]), 0.03))
    tifffile.imwrite(tmp_path / "a.tif", (noisy[0].movedim(0, -1) * 65535).round().numpy().astype(np.uint16))
    mask = np.zeros((180, 150), np.uint8)
    mask[100:] = 255
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    restorer = Restorer(small_network("photo"), tile=64, tile_overlap=16)
    told: list[float] = []
    whole = restorer.picture(read_image(tmp_path / "a.tif"), protect=mask, left=told.append)
    monkeypatch.setattr(streaming, "LARGE", 1)
    done = (
        streaming.Source(tmp_path / "a.tif")
        .load()
        .restore(restorer, tmp_path / "b.tif", lambda *_: None, None, tmp_path / "mask.tif")
    )
    assert done.left == told[0]
    found = tifffile.imread(tmp_path / "b.tif")
    assert np.abs(found.astype(int) - whole.pixels).max() <= 1
    assert np.array_equal(found[100:], tifffile.imread(tmp_path / "a.tif")[100:])


def test_several_pictures_in_one_pass_are_judged_each_for_itself():
    clean = photo(96, 80)
    noisy = rounded(clean + noise(clean.shape, 0.03))

    class Known(nn.Module):
        config = type("Config", (), {"task": "photo"})

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.3 * (clean - x)

    restorer = Restorer(Known())
    pictures = [read(x) for x in (clean, noisy)]
    told: list[float] = []
    together = restorer.pictures(pictures, left=[told.append, told.append])
    apart = [restorer.picture(one, left=told.append) for one in pictures]
    for a, b in zip(together, apart, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
    assert told[:2] == told[2:]
    assert told[0] == 1
    assert told[1] == 0
    assert np.array_equal(together[0].pixels, pictures[0].pixels)


def read(x: Tensor):
    from serpent_ir.image import Picture

    return Picture((x[0].movedim(0, -1) * 255).round().byte().numpy())
