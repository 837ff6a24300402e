"""The fit of `auto`: that it finds what is there, and what it looks at."""

import sys
from pathlib import Path

import pytest
import torch

from networks import small_network

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import fit_auto  # noqa: E402


def test_the_fit_finds_a_rule_that_is_there():
    """Cells whose change is right where a figure is above 0.3, and wrong elsewhere."""
    draw = torch.Generator().manual_seed(0)
    figures = torch.randn(10, 2, 40, 6, generator=draw)
    right = (figures[..., 2] > 0.3).double()
    change = torch.rand(10, 2, 40, generator=draw).double() * 1e-3 + 1e-4
    errors = torch.stack([right * change, -right * change, change], -1)  # a share s leaves (s - right)^2 of it
    pairs = fit_auto.Pairs(["clean", "noise4"], figures, errors)
    every = range(6)
    constants = fit_auto.fitted(pairs)
    found = fit_auto.loss_of(pairs, fit_auto.share_of(pairs, constants, every))
    best = fit_auto.loss_of(pairs, right)
    all_of_it = fit_auto.loss_of(pairs, torch.ones_like(right))
    assert found - best < 0.1 * (all_of_it - best)
    assert (constants[3].abs() > 10 * constants[[1, 2, 4, 5, 6]].abs()).all()
    assert -constants[0] / constants[3] == pytest.approx(0.3, abs=0.1)
    assert fit_auto.validated(pairs, every) < fit_auto.validated(pairs, [0, 1, 3, 4, 5])


def test_pairs_hold_the_damage_and_the_change_of_each_cell(tmp_path):
    import skimage.data
    from PIL import Image

    Image.fromarray(skimage.data.astronaut()[:128, 100:228]).save(tmp_path / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_auto, "SIDE", 64)
        pairs = fit_auto.pairs_of(small_network("photo"), [tmp_path / "a.png"])
    assert pairs.figures.shape == (1, len(pairs.kinds), 16, 6)
    assert pairs.errors.shape == (1, len(pairs.kinds), 16, 3)
    clean = pairs.kinds.index("clean")
    assert pairs.errors[0, clean, :, 0].max() < 1e-12
    assert pairs.errors[0, :, :, 2].min() > 0
    error, product, change = pairs.errors.mean(2)[0].unbind(-1)
    assert (product**2 <= error * change).all()  # Cauchy and Schwarz
    assert (error[pairs.kinds.index("noise8")] / error[pairs.kinds.index("noise4")]).item() == pytest.approx(
        4, rel=0.15
    )
