"""JPEG XL, where its package is installed."""

import io
from pathlib import Path

import numpy as np
import pytest

from image_files import draw, exif, picture, same, tags_of
from serpent_ir.image import read_image, write_image
from serpent_ir.image.jxl import bits_of

pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed: pip install 'serpent-ir[jxl]'")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_round_trip(mode, tmp_path):
    before = picture(mode)
    with pytest.warns(UserWarning, match=r"\.jxl cannot hold the ICC profile"):  # the plugin cannot write one
        write_image(tmp_path / "a.jxl", before)
    after = read_image(tmp_path / "a.jxl")
    assert (after.format, after.mode) == ("JXL", mode)
    assert same(after.pixels, before.pixels)
    assert same(after.alpha, before.alpha)
    assert tags_of(after.exif)[271] == "Maker"


def test_depth_and_turns(tmp_path):
    import pillow_jxl  # noqa: F401
    from PIL import Image

    grey = draw(np.uint16, channels=1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "deep.jxl", lossless=True)
    assert bits_of((tmp_path / "deep.jxl").read_bytes()) == 16
    assert np.array_equal(read_image(tmp_path / "deep.jxl").pixels[..., 0], grey)
    buffer = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'
    Image.fromarray(draw()).save(buffer, "JXL", lossless=True, exif=exif(6), xmp=xmp)
    assert bits_of(buffer.getvalue()) == 8
    file = Path(tmp_path / "turned.jxl")
    file.write_bytes(buffer.getvalue())
    after = read_image(file)
    assert same(after.pixels, draw())  # EXIF's orientation does not count in JPEG XL
    assert tags_of(after.exif)[0x0112] == 1
    assert after.xmp is not None
