"""A restored picture at other strengths, without its network: what `Restorer` makes at that strength."""

from dataclasses import replace

import numpy as np
import pytest
from skimage import data

from networks import small_network
from serpent_ir import Restorer
from serpent_ir.errors import UsageError
from serpent_ir.image import Picture
from serpent_ir.inference.reblending import Restoration

PIXELS = data.astronaut()[60:125, 140:217].copy()
ALPHA = np.add.outer(np.arange(65) * 3, np.arange(77) % 5 * 15).astype(np.uint8)
DEEP = PIXELS.astype(np.uint16) * 251 + 7
GREY = np.repeat(PIXELS[..., :1], 3, 2)
MASK = np.zeros((65, 77), np.uint8)
MASK[20:50, 10:44] = 255


@pytest.mark.parametrize(
    ("task", "picture"),
    [
        ("photo", Picture(PIXELS)),
        ("photo", Picture(DEEP)),
        ("deblur", Picture(GREY, mode="L")),
        ("deblur", Picture(PIXELS, alpha=ALPHA, mode="RGBA")),
        ("deblur", Picture(DEEP, alpha=ALPHA.astype(np.uint16) * 250, mode="RGBA")),
        ("sr2", Picture(PIXELS, alpha=ALPHA, mode="RGBA")),
        ("sr4", Picture(DEEP)),
    ],
)
def test_every_strength_is_what_the_restorer_makes(task, picture):
    network = small_network(task)
    passes: list[object] = []
    network.register_forward_hook(lambda *args: passes.append(args))
    restoration = Restoration.of(Restorer(network), picture)
    assert len(passes) == 1
    for strength in (0, 0.35, 1, 1.5):  # the page gives whole numbers as such
        for mask in (None, MASK):
            made = restoration.at(strength, mask)
            assert made.pixels.dtype == picture.pixels.dtype
            if strength == 0:
                wanted = Restorer(network, strength=0).picture(picture)
            else:
                wanted = Restorer(network, strength=strength).picture(picture, protect=mask)
            change = np.abs(made.pixels.astype(int) - wanted.pixels)
            assert change.max() <= (2 if picture.pixels.dtype == np.uint16 else 1)
            if picture.pixels.dtype == np.uint8:
                # A level of 16 bits seldom decides a rounding, and in colour at full strength never.
                assert (change > 0).mean() <= (0 if strength == 1 and mask is None and not picture.is_grey else 0.02)
            assert (made.alpha is None) == (picture.alpha is None)
            if made.alpha is not None and wanted.alpha is not None:
                assert made.alpha.dtype == picture.pixels.dtype
                np.testing.assert_array_equal(made.alpha, wanted.alpha)
            assert made.is_grey == picture.is_grey
    assert len(passes) == 1 + 8  # those of the restorers


def test_what_cannot_be_blended_is_refused():
    network = small_network("photo")
    with pytest.raises(UsageError, match=r"a restorer of strength 0\.5"):
        Restoration.of(Restorer(network, strength=0.5), Picture(PIXELS))
    restoration = Restoration.of(Restorer(network), Picture(PIXELS))
    with pytest.raises(UsageError, match=r"a strength of 1\.6"):
        restoration.at(1.6)
    with pytest.raises(UsageError, match="the mask is 77x64 px and the image 77x65"):
        restoration.at(1, MASK[1:])


def test_how_much_auto_left_is_kept():
    assert Restoration.of(Restorer(small_network("deblur")), Picture(PIXELS)).left is None
    left = Restoration.of(Restorer(small_network("deblur"), auto=True), replace(Picture(PIXELS), mode="RGB")).left
    assert left is not None and 0 <= left <= 1
