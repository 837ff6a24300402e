"""Samples of Pillow's images, and images on samples."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw

from serpent_ir.image import pillow
from serpent_ir.image.pillow import colours_and_alpha, copy_rows, image_on

SAMPLES = np.random.default_rng(1).integers(0, 256, (150, 7, 4), np.uint8)


@pytest.mark.parametrize("band", [1, 500, 1 << 18])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_samples_come_as_pillow_gives_them(mode, band, monkeypatch):
    monkeypatch.setattr(pillow, "_BAND", band)
    expected = SAMPLES[..., : len(mode)]
    image = Image.fromarray(expected)
    colours, alpha = colours_and_alpha(image)
    np.testing.assert_array_equal(colours, expected[..., :3])
    assert alpha is None if mode == "RGB" else np.array_equal(alpha, expected[..., 3])
    rows = np.zeros((100, 7, len(mode)), np.uint8)
    copy_rows(image, slice(31, 131), rows)
    np.testing.assert_array_equal(rows, expected[31:131])


CHANGES = {
    "drawing": lambda image: ImageDraw.Draw(image).rectangle((0, 0, 3, 3), fill=(1, 2, 3)),
    "a pixel": lambda image: image.putpixel((0, 0), (9, 9, 9)),
    "pasting": lambda image: image.paste((1, 1, 1), (0, 0, 5, 5)),
    "alpha": lambda image: image.putalpha(7),
}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_image_on_samples_is_like_any_other(mode):
    samples = SAMPLES.copy()
    samples[..., 3] = 255 if mode == "RGB" else samples[..., 3]
    expected = Image.fromarray(samples[..., : len(mode)])
    made = image_on(samples, mode)
    assert made == expected and made.mode == mode and made.tobytes() == expected.tobytes()
    file = io.BytesIO()
    made.save(file, "PNG")
    assert Image.open(file).copy() == expected == pickle.loads(pickle.dumps(made)) == made.copy()
    for change in CHANGES.values():
        one, other = image_on(samples, mode), expected.copy()
        change(one)
        change(other)
        assert one == other != expected
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))
    np.testing.assert_array_equal(samples[..., : len(mode)], SAMPLES[..., : len(mode)])


def test_a_pillow_that_keeps_another_layout_gets_a_copy(monkeypatch):
    monkeypatch.setattr(Image.Image, "im", property(lambda self: object()))
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: mode)
    monkeypatch.setattr(Image, "frombuffer", lambda *_: Image.Image())
    assert image_on(SAMPLES, "RGB") == "RGB"
