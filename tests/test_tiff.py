"""TIFFs: kinds of samples, what they say beside their pixels, and their pages, read back by other readers."""

import io
import struct
import warnings

import numpy as np
import pytest
import tifffile

from image_files import draw
from serpent_ir.errors import ImageError
from serpent_ir.image import read_image
from serpent_ir.tiff import TiffRows


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("samples", "alpha"), [(2, "unspecified"), (2, "assocalpha"), (2, "unassalpha"), (5, "unspecified")]
)
def test_grey_with_more_samples(samples, alpha, dtype, tmp_path):
    stored = draw(dtype, channels=samples)
    extra = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [alpha] * (samples - 1)}
    tifffile.imwrite(tmp_path / "a.tif", stored, **extra)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read = read_image(tmp_path / "a.tif")
    assert read.is_grey
    assert [f"has {samples - 1} channel" in str(one.message) for one in told] == [True] * (alpha == "unspecified")
    expected = stored[..., 0]
    if alpha == "assocalpha":
        full = np.iinfo(dtype).max
        expected = np.rint(np.minimum(expected / np.maximum(stored[..., 1], 1), 1) * full).astype(dtype)
    assert np.array_equal(read.pixels[..., 0], expected)
    assert (read.alpha is None) == (alpha == "unspecified")


@pytest.mark.parametrize(
    ("photometric", "dtype", "said"),
    [("cfa", np.uint8, "uint8 samples, CFA"), ("icclab", np.uint8, "ICCLAB"), ("separated", np.uint16, "SEPARATED")],
)
def test_colours_that_are_not_read_are_named(photometric, dtype, said, tmp_path):
    channels = {"cfa": 1, "separated": 4}.get(photometric, 3)
    pixels = draw(dtype, channels=channels)
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0] if channels == 1 else pixels, photometric=photometric)
    with pytest.raises(ImageError, match=f"{said}.*; supported are unsigned .* convert it first"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("tag", [256, 257])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}, {"bigtiff": True}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_without_pixels_is_damaged(dtype, options, tag, tmp_path):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, draw(dtype), photometric="rgb", **options)
    place = tifffile.TiffFile(io.BytesIO(buffer.getvalue())).pages.first.aspage().tags[tag].valueoffset
    content = bytearray(buffer.getvalue())
    struct.pack_into("<H", content, place, 0)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.tif: is damaged"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ImageError), (tmp_path / "a.tif").open("rb") as file:
        TiffRows(file)
