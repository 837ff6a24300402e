"""Files made here from drawn images and scikit-image's bundled ones: what is read, written, kept and refused."""

import dataclasses
import warnings
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image, ImageOps, features

from image_files import ICC, LOSSLESS, draw, exif, picture, same, tags_of
from serpent_ir.errors import ImageError, UsageError
from serpent_ir.files import Source
from serpent_ir.image import Picture, read_image, to_pixels, to_tensor, write_image
from serpent_ir.inference import Restorer
from serpent_ir.models.padding import pad_to_multiple


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_round_trip_8_bit(suffix, mode, tmp_path):
    before = picture(mode)
    if suffix == ".bmp":
        before = dataclasses.replace(before, alpha=None, icc_profile=None, exif=None)
    write_image(tmp_path / f"a{suffix}", before)
    after = read_image(tmp_path / f"a{suffix}")
    assert same(after.pixels, before.pixels)
    assert same(after.alpha, before.alpha)
    assert after.icc_profile == before.icc_profile
    assert after.is_grey == (before.is_grey and suffix != ".webp")  # WebP has colour only
    assert (after.exif is None) == (before.exif is None)
    if suffix == ".webp":  # has no resolution but in EXIF
        assert tags_of(after.exif) == {**tags_of(before.exif), 282: 300, 283: 150, 296: 2}
    else:
        assert after.exif is before.exif is None or tags_of(after.exif) == tags_of(before.exif)
        assert after.dpi == pytest.approx((300, 150), rel=1e-4)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_round_trip_16_bit(suffix, mode, tmp_path):
    before = picture(mode, np.uint16)
    file = tmp_path / f"a{suffix}"
    write_image(file, before)
    after = read_image(file)
    assert same(after.pixels, before.pixels)
    assert same(after.alpha, before.alpha)
    assert after.icc_profile == before.icc_profile
    assert after.is_grey == before.is_grey
    assert tags_of(after.exif) == tags_of(before.exif)
    assert after.dpi == pytest.approx((300, 150), rel=1e-4)
    if (suffix, mode) != (".tiff", "LA"):  # which Pillow does not open
        with Image.open(file) as checked:  # every chunk is well-formed
            checked.verify()
    write_image(file.with_suffix(".png"), dataclasses.replace(after, exif=None))
    assert same(read_image(file.with_suffix(".png")).pixels, before.pixels)


@pytest.mark.parametrize("dark", [1, 256])
def test_depth_is_that_of_the_header(dark, tmp_path):
    """A 16-bit file whose values would fit 8 bits stays 16-bit."""
    pixels = draw(np.uint8).astype(np.uint16) // dark
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, Picture(pixels))
        assert same(read_image(tmp_path / name).pixels, pixels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg(mode, tmp_path):
    before = dataclasses.replace(picture(mode), dpi=(300.0, 150.0))
    write_image(tmp_path / "a.JPG", before)
    after = read_image(tmp_path / "a.JPG")
    assert np.abs(after.pixels.astype(int) - before.pixels).mean() < 4
    assert after.is_grey == before.is_grey
    assert (after.icc_profile, after.dpi) == (ICC, (300, 150))
    assert tags_of(after.exif) == tags_of(before.exif)
    if mode == "RGB":
        with Image.open(tmp_path / "a.JPG") as stored:
            layers = stored.layer  # pyright: ignore[reportAttributeAccessIssue]
        assert {layer[1:3] for layer in layers} == {(1, 1)}  # 4:4:4


def test_16_bits_are_rounded_to_8(tmp_path):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, -1)
    with pytest.warns(UserWarning, match=r"\.webp cannot hold 16 bits; write \.png to keep everything"):
        write_image(tmp_path / "a.webp", Picture(pixels))
    assert same(read_image(tmp_path / "a.webp").pixels, np.floor(pixels / 257 + 0.5).astype(np.uint8))


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".png"])
def test_a_profile_for_grey_is_not_put_beside_colour(suffix, tmp_path):
    grey = dataclasses.replace(picture("L"), icc_profile=ICC[:16] + b"GRAY" + ICC[20:])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        write_image(tmp_path / f"a{suffix}", grey)
    with Image.open(tmp_path / f"a{suffix}") as stored:
        fits = stored.mode == "L"
        assert ("icc_profile" in stored.info) == fits == (not said)
    assert all("cannot hold an ICC profile for grey" in str(warning.message) for warning in said)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_what_a_format_cannot_hold_is_named(suffix, tmp_path):
    with pytest.warns(UserWarning, match=r"cannot hold transparency.*write \.png"):
        write_image(tmp_path / f"a{suffix}", picture("RGBA"))
    opaque = Picture(draw(), np.full((23, 37), 255, np.uint8))
    write_image(tmp_path / f"b{suffix}", opaque)  # nothing is lost, so nothing is said
    assert read_image(tmp_path / f"b{suffix}").alpha is None


def pillow_modes() -> dict[str, Image.Image]:
    rgb = Image.fromarray(draw())
    palette = rgb.quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "1": rgb.convert("1"),
        "L": rgb.convert("L"),
        "P": palette,
        "P+t": see_through,
        "RGBA": Image.fromarray(draw(channels=4)),
        "LA": Image.fromarray(draw(channels=2)),
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "I;16": Image.fromarray(draw(np.uint16, channels=1)[..., 0]),
    }


@pytest.mark.parametrize("mode", pillow_modes())
@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "jpg", "webp", "jp2", "ppm", "tga", "avif"])
def test_reads_what_pillow_writes(mode, suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    source = pillow_modes()[mode]
    file = tmp_path / f"a.{suffix}"
    try:
        source.save(file)
    except (OSError, ValueError) as error:
        pytest.skip(f"not a mode of this format: {error}")
    try:
        with Image.open(file) as stored:
            stored.load()
    except OSError:  # Pillow 12 cannot read the YCbCr TIFF that it wrote; we can
        assert (mode, suffix) == ("YCbCr", "tif")
        assert np.array_equal(read_image(file).pixels, np.asarray(source.convert("RGB")))
        return
    with Image.open(file) as stored:
        with pytest.warns(UserWarning, match="is CMYK without") if stored.mode == "CMYK" else nullcontext():
            after = read_image(file)
        assert after.format == stored.format
        if after.pixels.dtype == np.uint16:
            assert np.array_equal(after.pixels[..., 0], np.asarray(source))
            assert after.is_grey
            return
        if stored.mode != "I;16":
            assert after.mode == stored.mode
        expected = np.asarray(stored.convert("RGBA"))
    assert np.array_equal(after.pixels, expected[..., :3])
    if after.alpha is None:
        assert (expected[..., 3] == 255).all()
    else:
        assert np.array_equal(after.alpha, expected[..., 3])


@pytest.mark.parametrize("name", ["astronaut.png", "camera.png", "rocket.jpg", "chelsea.png", "page.png"])
def test_real_images(name, tmp_path):
    file = Path(str(skimage.data.__file__)).parent / name
    before = read_image(file)
    with Image.open(file) as stored:
        assert np.array_equal(before.pixels, np.asarray(stored.convert("RGB")))
    write_image(tmp_path / "a.png", before)
    assert same(read_image(tmp_path / "a.png").pixels, before.pixels)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_first_frame(suffix, tmp_path):
    frames = [Image.fromarray(draw(seed=seed)).quantize(64) for seed in range(3)]
    file = tmp_path / f"a.{suffix}"
    options: dict = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=rf"a\.{suffix}: holds 3 (images|pages); the first is taken"):
        assert np.array_equal(read_image(file).pixels, np.asarray(frames[0].convert("RGB")))
    if suffix == "tif":
        tifffile.imwrite(file, np.stack([draw(np.uint16, seed=seed) for seed in range(3)]), photometric="rgb")
        with pytest.warns(UserWarning, match="holds 3 pages"):
            assert same(read_image(file).pixels, draw(np.uint16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation(orientation, suffix, tmp_path):
    source = Image.fromarray(draw(channels=3))
    file = tmp_path / f"a{suffix}"
    source.save(file, exif=exif(orientation), dpi=(300, 150))
    after = read_image(file)
    with Image.open(file) as stored:
        assert np.array_equal(after.pixels, np.asarray(ImageOps.exif_transpose(stored)))
    assert tags_of(after.exif).get(0x0112, 1) == 1
    assert tags_of(after.exif)[271] == "Maker"
    if suffix != ".webp":
        assert after.dpi == pytest.approx((150, 300) if orientation >= 5 else (300, 150), rel=1e-4)
    write_image(file, after)
    assert read_image(file).pixels.shape == after.pixels.shape


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_16_bits(orientation, tmp_path):
    pixels = draw(np.uint16)
    write_image(tmp_path / "a.png", Picture(pixels, exif=exif(orientation)))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, np.rot90(pixels, {3: 2, 6: -1}[orientation]))
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=[(274, "H", 1, orientation, True)], photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, np.rot90(pixels, {3: 2, 6: -1}[orientation]))


@pytest.mark.parametrize(
    "options", [{}, {"tile": (16, 16)}, {"byteorder": ">"}, {"bigtiff": True}, {"rowsperstrip": 5}]
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_tiff_layouts(options, compression, tmp_path):
    pixels = draw(np.uint16)
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, pixels, photometric="rgb", compression=compression, **options)
    assert same(read_image(file).pixels, pixels)
    tifffile.imwrite(file, pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **options)
    assert same(read_image(file).pixels, pixels)
    tifffile.imwrite(file, pixels[..., 0], photometric="miniswhite", compression=compression, **options)
    assert same(read_image(file).pixels, np.repeat(65535 - pixels[..., :1], 3, -1))


def test_16_bit_tiff_of_other_programs(tmp_path):
    pixels = draw(np.uint16, channels=4)
    cv2.imwrite(str(tmp_path / "lzw.tif"), pixels[..., 2::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    assert same(read_image(tmp_path / "lzw.tif").pixels, pixels[..., :3])
    grey = pixels[..., 0]
    turned = {"compression": "tiff_lzw", "tiffinfo": {274: 6}}
    Image.fromarray(grey).save(tmp_path / "turned.tif", **turned)
    assert np.array_equal(read_image(tmp_path / "turned.tif").pixels[..., 0], np.rot90(grey, -1))
    tifffile.imwrite(tmp_path / "mask.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    with pytest.warns(UserWarning, match="has 1 channel beside its colours; left out"):
        after = read_image(tmp_path / "mask.tif")
    assert same(after.pixels, pixels[..., :3])
    assert after.alpha is None
    alpha = np.maximum(pixels[..., 3:], 9000)
    premultiplied = np.rint(pixels[..., :3] * (alpha / 65535)).astype(np.uint16)
    stored = np.concatenate([premultiplied, alpha], -1)
    tifffile.imwrite(tmp_path / "p.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    after = read_image(tmp_path / "p.tif")
    assert np.abs(after.pixels.astype(int) - pixels[..., :3]).max() <= 4
    assert after.alpha is not None
    assert np.array_equal(after.alpha, alpha[..., 0])


def test_a_compression_that_is_not_read_is_named(tmp_path):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, draw(np.uint16), photometric="rgb")
    with tifffile.TiffFile(file) as tiff:
        place = tiff.pages.first.aspage().tags[259].valueoffset
    content = bytearray(file.read_bytes())
    content[place : place + 2] = (50000).to_bytes(2, "little")  # Zstandard
    file.write_bytes(content)
    with pytest.raises(ImageError, match=r"of 16 bits are compressed \(ZSTD\) .* save it as Deflate or uncompressed"):
        read_image(file)


def test_a_size_that_a_format_cannot_hold_is_told_before_the_work(tmp_path):
    write_image(tmp_path / "a.png", Picture(np.zeros((1, 2048, 3), np.uint8)))
    restorer = Restorer("serpent_b.sr8", device="cpu")
    with pytest.raises(ImageError, match=r"a\.png: would be 16384x8 px, and \.webp holds 16383 a side; choose \.png"):
        Source(tmp_path / "a.png").restore(restorer, tmp_path / "b.webp", lambda *_: None)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint32, np.int32, np.int16, np.int8])
def test_other_samples_are_refused(dtype, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", draw().astype(dtype), photometric="rgb")
    with pytest.raises(ImageError, match=rf"a\.tif: has {np.dtype(dtype)} samples.*8- and 16-bit integers.*convert"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tensors(dtype):
    full = np.iinfo(dtype).max
    pixels = np.arange(full + 1, dtype=dtype).repeat(3).reshape(16, -1, 3)
    tensor = to_tensor(pixels)
    assert (tensor.dtype, tensor.shape, tensor.min(), tensor.max()) == (
        torch.float32,
        (1, 3, 16, (full + 1) // 16),
        0,
        1,
    )
    for back in (to_pixels(tensor, dtype), to_pixels(tensor.double() + 0.4 / full, dtype)):
        assert same(back, pixels)
    assert to_pixels(torch.tensor([-3.0, 0.5, 7.0]).view(1, 3, 1, 1), dtype).tolist() == [[[0, (full + 1) // 2, full]]]
    for bad in (torch.nan, torch.inf):
        tensor[0, 1, 2, 3] = bad
        with pytest.raises(ImageError, match="NaN"):
            to_pixels(tensor, dtype)
    with pytest.raises(UsageError):
        to_pixels(tensor[0], dtype)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 8), (9, 15), (17, 5)])
def test_pad_to_multiple(size):
    x = torch.rand(2, 3, *size)
    padded = pad_to_multiple(x, 8)
    assert padded.shape[-2:] == tuple(-(-side // 8) * 8 for side in size)
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    expected = x.numpy()
    for axis, side in ((2, size[0]), (3, size[1])):
        pad = [(0, 0)] * 4
        pad[axis] = (0, -side % 8)
        expected = np.pad(expected, pad, mode="reflect" if -side % 8 < side else "edge")
    assert np.array_equal(padded.numpy(), expected)
    larger = pad_to_multiple(x, 8, least=16)
    assert larger.shape[-2:] == tuple(max(side, 16) for side in padded.shape[-2:])
    assert torch.equal(larger[..., : size[0], : size[1]], x)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("opencv_reads_it", [True, False])
@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_depth_that_pillow_cuts_is_kept_or_told(bits, opencv_reads_it, tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]', which encodes 10 bits")
    with av.open(tmp_path / "a.avif", "w", format="avif") as file:
        stream = file.add_stream("libsvtav1", rate=1, options={"svtav1-params": "lp=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le" if bits == 10 else "yuv420p"
        drawn = av.VideoFrame.from_ndarray(draw(height=64, width=64), format="rgb24").reformat(format=stream.pix_fmt)
        file.mux([*stream.encode(drawn), *stream.encode()])
    if not opencv_reads_it:
        monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    elif bits > 8 and not cv2.haveImageReader(str(tmp_path / "a.avif")):
        pytest.skip("this OpenCV reads no AVIF")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = read_image(tmp_path / "a.avif").pixels
    kept = bits > 8 and opencv_reads_it
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == (np.uint16 if kept else np.uint8)
    with Image.open(tmp_path / "a.avif") as image:
        assert np.abs(pixels / np.iinfo(pixels.dtype).max - np.asarray(image) / 255).mean() < 1 / 200
    if kept:
        assert (np.rint(pixels / 65535 * 1023) % 4 > 0).any()  # more levels than 8 bits have
    told = ["has 10 bits; 8 of them are kept"] * (bits > 8 and not kept)
    assert [str(each.message).partition(": ")[2] for each in caught] == told


def test_colour_of_16_bits_that_becomes_8_is_told(tmp_path):
    pixels = draw(np.uint16, height=64, width=64)
    (tmp_path / "a.ppm").write_bytes(b"P6\n# 255\n64 64\n65535\n" + pixels.astype(">u2").tobytes())
    cv2.imwrite(str(tmp_path / "a.jp2"), pixels)
    for name in ("a.ppm", "a.jp2"):
        with pytest.warns(UserWarning, match="has 16 bits; 8 of them are kept"):
            assert read_image(tmp_path / name).pixels.dtype == np.uint8
    (tmp_path / "g.pgm").write_bytes(b"P5 64 64 65535\n" + pixels[..., 0].astype(">u2").tobytes())
    cv2.imwrite(str(tmp_path / "g.jp2"), pixels[..., 0])
    Image.fromarray(draw(np.uint8)).save(tmp_path / "a8.ppm")
    for name in ("g.pgm", "g.jp2", "a8.ppm"):
        read_image(tmp_path / name)  # no word, which would be an error here
