"""What comes out of a restoration differs from what went in by its pixels only: every format through a network that
changes nothing, and both files read by other programs' means (Pillow, OpenCV, tifffile)."""

import io
import struct
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.color
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, features
from PIL.PngImagePlugin import PngInfo

from image_files import ICC, draw, exif, tags_of
from networks import identity_network
from serpent_ir.data.files import read_rgb8
from serpent_ir.errors import ImageError
from serpent_ir.files import Source
from serpent_ir.image import Picture, fill_transparent, read_image, to_tensor, write_image
from serpent_ir.inference import Restorer, restore

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

UPRIGHT = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF tiff:Orientation=\"1\"/></x:xmpmeta>"
RESTORER = Restorer(identity_network())


def restore_file(source: Path, target: Path) -> None:
    Source(source).load().restore(RESTORER, target, lambda done, total: None).write()


def drawn(mode: str, dtype: type) -> np.ndarray:
    channels = len(mode) if mode != "P" else 3
    return draw(dtype, channels=channels) if channels > 1 else draw(dtype, channels=1)[..., 0]


def save(path: Path, mode: str, dtype: type, orientation: int | None, metadata: bool) -> None:
    """Write a file without this package, with all the metadata that can be put there so."""
    array, xmp = drawn(mode, dtype), UPRIGHT.replace(b'"1"', b'"%d"' % (orientation or 1))
    about = {"icc_profile": ICC, "xmp": xmp, "exif": exif(orientation), "dpi": (300, 150)} if metadata else {}
    if path.suffix == ".tif":
        tags = [(274, "H", 1, orientation, True)] if orientation else []
        if metadata:
            tags += [(271, "s", 0, "Maker", True), (700, "B", len(xmp), xmp, True)]
        options: dict = {"resolution": (300, 150), "resolutionunit": "INCH", "iccprofile": ICC} if metadata else {}
        options |= {"photometric": "rgb" if array.ndim == 3 and array.shape[2] > 2 else "minisblack"}
        if array.ndim == 3:
            options |= {"planarconfig": "contig", "extrasamples": ["unassalpha"] * (array.shape[2] in (2, 4))}
        tifffile.imwrite(path, array, extratags=tags, metadata=None, software=False, **options)
        return
    if dtype == np.uint16:  # by OpenCV, the metadata put in by this package's writer, which has tests of its own
        write_image(path, Picture(_rgb(array), _alpha(array), "I;16" if array.ndim == 2 else mode, **about))
        return
    image = Image.fromarray(array)
    options = {".webp": {"lossless": True, "exact": True}, ".avif": {"quality": 100}}.get(path.suffix, {})
    if path.suffix == ".png" and metadata:
        texts = PngInfo()
        texts.add_text("Author", "A person")
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": texts}
    image = image.quantize(32) if mode == "P" else image
    image.save(path, **options, **about)


def _rgb(array: np.ndarray) -> np.ndarray:
    colours = array[..., None] if array.ndim == 2 else array[..., :-1] if array.shape[2] in (2, 4) else array
    return np.ascontiguousarray(np.broadcast_to(colours, (*array.shape[:2], 3)))


def _alpha(array: np.ndarray) -> np.ndarray | None:
    return np.ascontiguousarray(array[..., -1]) if array.ndim == 3 and array.shape[2] in (2, 4) else None


def upright(path: Path, orientation: int | None) -> np.ndarray:
    """The samples as another program shows them, colour as RGB(A)."""
    if path.suffix == ".tif":
        array = tifffile.imread(path)
    elif cv2.haveImageReader(str(path)) and path.suffix == ".png" and path.read_bytes()[24] == 16:
        array = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        assert array is not None
        array = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array
    else:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            array = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        orientation = None
    turns = {3: 2, 6: -1, 8: 1}
    return np.rot90(array, turns[orientation]) if orientation in turns else array


LOSSLESS = [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tif", np.uint16)]
LOSSLESS += [(".webp", np.uint8), (".bmp", np.uint8)]
MODES = {".bmp": ["L", "RGB", "P"], ".webp": ["RGB", "RGBA"], ".tif": ["L", "LA", "RGB", "RGBA"]}
CASES = [
    (suffix, dtype, mode, orientation, metadata)
    for suffix, dtype in LOSSLESS
    for mode in MODES.get(suffix, ["L", "LA", "RGB", "RGBA"] + ["P"] * (dtype == np.uint8))
    for orientation, metadata in ((None, False), (None, True), (3, True), (6, True), (6, False))
    if suffix != ".bmp" or not (orientation or metadata)
    if suffix == ".tif" or metadata or not orientation
]


@pytest.mark.parametrize(("suffix", "dtype", "mode", "orientation", "metadata"), CASES)
def test_lossless_formats_keep_every_pixel_and_all_metadata(suffix, dtype, mode, orientation, metadata, tmp_path):
    before, after = tmp_path / f"before{suffix}", tmp_path / f"after{suffix}"
    save(before, mode, dtype, orientation, metadata)
    whole = before.read_bytes()
    restore_file(before, after)
    assert before.read_bytes() == whole
    expected, found = upright(before, orientation), upright(after, None)
    assert found.dtype == expected.dtype == dtype or suffix == ".webp"
    np.testing.assert_array_equal(found, expected)
    old, new = read_image(before), read_image(after)
    assert new.is_grey == old.is_grey
    assert bool(metadata) == bool(new.icc_profile) == bool(new.xmp)
    if metadata:
        assert new.icc_profile == ICC
        assert new.xmp == UPRIGHT
        resolution = {282: 300, 283: 150, 296: 2} if suffix == ".webp" and old.dpi else {}
        assert {274: 1, **tags_of(new.exif)} == {274: 1, **tags_of(old.exif), **resolution}
        assert tags_of(new.exif)[271] == "Maker"
        if suffix != ".webp":
            assert new.dpi == pytest.approx((150, 300) if orientation == 6 else (300, 150), rel=1e-4)
    if metadata and suffix == ".png" and dtype == np.uint8:
        with Image.open(after) as image:
            assert image.info["Author"] == "A person"


@pytest.mark.parametrize(("suffix", "mode"), [(".jpg", "L"), (".jpg", "RGB"), (".avif", "RGB"), (".avif", "RGBA")])
@pytest.mark.parametrize("orientation", [None, 6])
def test_lossy_formats_keep_all_metadata(suffix, mode, orientation, tmp_path):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    before, after = tmp_path / f"before{suffix}", tmp_path / f"after{suffix}"
    save(before, mode, np.uint8, orientation, metadata=True)
    restore_file(before, after)
    assert np.abs(upright(before, None).astype(int) - upright(after, None)).mean() < 2
    old, new = read_image(before), read_image(after)
    assert (new.is_grey, new.icc_profile) == (old.is_grey, ICC)
    assert {274: 1, **tags_of(new.exif)} == {274: 1, **tags_of(old.exif)}
    assert (new.xmp, new.dpi) == (UPRIGHT, old.dpi)


def test_an_orientation_is_changed_in_place_and_nothing_else_is(tmp_path):
    """Maker notes hold offsets into the EXIF data, and would not survive another writer. The thumbnail, as it was and
    not upright, is no longer found."""
    tags = Image.Exif()
    tags[271], tags[274] = "Maker", 6
    tags.get_ifd(0x8769)[37500] = b"\x01\x02notes"
    plain = tags.tobytes()
    directory = 6 + int.from_bytes(plain[10:14], "big")
    pointer = directory + 2 + 12 * int.from_bytes(plain[directory : directory + 2], "big")
    second = struct.pack(">HHHII", 1, 513, 4, 1, 77) + bytes(4)  # of a thumbnail, which stands at 77
    data = plain[:pointer] + struct.pack(">I", len(plain) - 6) + plain[pointer + 4 :] + second + b"thumbnail"
    Image.fromarray(draw()).save(tmp_path / "a.jpg", exif=data)
    kept = read_image(tmp_path / "a.jpg").exif
    assert kept is not None
    different = [i for i in range(len(data)) if kept[i] != data[i] and not pointer <= i < pointer + 4]
    assert len(kept) == len(data)
    assert [(data[i], kept[i]) for i in different] == [(6, 1)]
    assert kept[pointer : pointer + 4] == bytes(4)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_size_in_the_exif_data_is_that_of_the_image(suffix, tmp_path):
    tags = Image.Exif()
    tags[274] = 6
    tags.get_ifd(0x8769).update({40962: 37, 40963: 23})
    Image.fromarray(draw()).save(tmp_path / f"a{suffix}", exif=tags.tobytes())
    write_image(tmp_path / f"b{suffix}", read_image(tmp_path / f"a{suffix}"))
    with Image.open(tmp_path / f"b{suffix}") as image:
        found = image.getexif().get_ifd(0x8769)
        assert (found[40962], found[40963]) == image.size == (23, 37)


def test_photos_of_iphones(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="pip install 'serpent-ir[heic]'")
    kinds = [kind for kind in Image.ID if kind != "HEIF"]  # another package of this process may have registered it
    monkeypatch.setattr(Image, "ID", kinds)
    photo = heif.from_pillow(Image.fromarray(draw(height=64, width=96)))
    photo.info.update(exif=exif(6), icc_profile=ICC)
    photo.save(tmp_path / "a.heic", quality=-1, chroma=444, matrix_coefficients=0)  # lossless; its turn is its own
    restore_file(tmp_path / "a.heic", tmp_path / "a.png")
    made = read_image(tmp_path / "a.png")
    expected = np.asarray(heif.open_heif(tmp_path / "a.heic"))
    assert np.array_equal(made.pixels, expected)
    assert (made.icc_profile, tags_of(made.exif)[271], tags_of(made.exif)[274]) == (ICC, "Maker", 1)
    assert "HEIF" not in Image.ID  # Pillow is everybody's
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a\.heic: is HEIC, .*pip install 'serpent-ir\[heic\]'; or export it"):
        read_image(tmp_path / "a.heic")


def cmyk_profile() -> bytes:
    """A small ICC profile of a press whose inks are ideal: a table of the 16 full overprints in Lab."""
    ideal = np.array(
        [[(1 - c) * (1 - k), (1 - m) * (1 - k), (1 - y) * (1 - k)] for c, m, y, k in np.ndindex(2, 2, 2, 2)]
    )
    lab = skimage.color.rgb2lab(ideal.astype(np.float64))
    table = np.rint(lab * (2.55, 1, 1) + (0, 128, 128)).clip(0, 255).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + straight * 4 + table + straight * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"A2B0": lut, b"wtpt": white, b"desc": text, b"cprt": b"text" + bytes(4) + b"x\0"}
    offset, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        entries += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    size = struct.pack(">I", offset + len(body))
    header = size + bytes(4) + b"\2\x40\0\0" + b"prtrCMYKLab " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    return header.ljust(68, b"\0") + white[8:] + bytes(48) + struct.pack(">I", len(tags)) + entries + body


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_is_converted_by_its_profile_with_a_word(suffix, tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 4:8] = (255, 0, 0, 0)
    inks[:, 8:12] = (0, 255, 255, 0)
    inks[:, 12:] = (0, 0, 0, 255)
    options: dict = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    Image.fromarray(inks, "CMYK").save(tmp_path / f"a{suffix}", icc_profile=cmyk_profile(), **options)
    with pytest.warns(UserWarning, match=rf"a{suffix}: is CMYK; converted to sRGB by its colour profile"):
        picture = read_image(tmp_path / f"a{suffix}")
    expected = np.array([(255, 255, 255), (0, 255, 255), (255, 0, 0), (0, 0, 0)])
    # Full inks are out of what sRGB shows after the adaptation of the white point, by a little.
    assert np.abs(picture.pixels[8, 1::4].astype(int) - expected).max() < 60
    assert picture.icc_profile is not None
    assert ImageCms.ImageCmsProfile(io.BytesIO(picture.icc_profile)).profile.xcolor_space == "RGB "


def test_cmyk_without_a_profile_of_its_own_is_converted_by_a_formula(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    cmyk = Image.fromarray(draw()).convert("CMYK")
    cmyk.save(tmp_path / "plain.jpg")
    with pytest.warns(UserWarning, match="plain.jpg: is CMYK without a usable colour profile; converted to RGB"):
        assert read_image(tmp_path / "plain.jpg").icc_profile is None
    cmyk.save(tmp_path / "wrong.tif", icc_profile=srgb.tobytes())  # a profile of another space
    with pytest.warns(UserWarning, match="without a usable"):
        read_image(tmp_path / "wrong.tif")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    suffix=st.sampled_from([".png", ".tif", ".webp"]),
    channels=st.integers(1, 4),
    deep=st.booleans(),
    dpi=st.none() | st.tuples(*[st.floats(1, 10000)] * 2),
    icc=st.none() | st.binary(min_size=1, max_size=300),
)
def test_any_picture_survives_being_written_and_read(height, width, suffix, channels, deep, dpi, icc, tmp_path):
    deep = deep and suffix != ".webp"
    array = np.random.default_rng(0).integers(0, 65536 if deep else 256, (height, width, channels))
    array = array.astype(np.uint16 if deep else np.uint8)
    mode = ["I;16" if deep else "L", "LA", "RGB", "RGBA"][channels - 1]
    before = Picture(_rgb(array if channels > 1 else array[..., 0]), _alpha(array), mode, icc_profile=icc, dpi=dpi)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_image(tmp_path / f"a{suffix}", before)
        after = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(after.pixels, before.pixels)
    assert (after.alpha is None) == (before.alpha is None) or suffix == ".webp"
    if after.alpha is not None and before.alpha is not None:
        np.testing.assert_array_equal(after.alpha, before.alpha)
    assert after.icc_profile == icc
    if suffix != ".webp" and dpi:
        assert after.dpi == pytest.approx(dpi, rel=0.02, abs=0.02)  # PNG counts whole pixels a metre


# Alpha


def test_what_cannot_be_seen_does_not_darken_the_edge():
    """A blur over a cut-out: its edge keeps the object's colour whatever stands in the transparent pixels."""
    import torch
    from torch import nn

    class Blur(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(x, 9, 1, 4, count_include_pad=False)

    rgba = np.zeros((48, 48, 4), np.uint8)
    rgba[12:36, 12:36] = (200, 120, 40, 255)
    rgba[11, 12:36] = (200, 120, 40, 90)  # an edge that is half transparent
    restored = np.asarray(restore(Image.fromarray(rgba), Blur()))
    np.testing.assert_array_equal(restored[..., 3], rgba[..., 3])
    seen = rgba[..., 3] > 0
    assert np.abs(restored[seen][:, :3].astype(int) - (200, 120, 40)).max() <= 1
    np.testing.assert_array_equal(restored[~seen], rgba[~seen])  # hidden colours are kept


def test_fill_transparent_changes_only_what_cannot_be_seen():
    x = to_tensor(draw())
    alpha = (to_tensor(draw(seed=1))[:, :1] > 0.6).float()
    filled = fill_transparent(x, alpha)
    seen = alpha.expand_as(x) > 0
    assert (filled[seen] == x[seen]).all()
    assert filled[~seen].min() >= x[seen].min()
    assert filled[~seen].max() <= x[seen].max()
    assert fill_transparent(x, alpha * 0 + 1) is x
    assert fill_transparent(x, alpha * 0).isfinite().all()


def test_files_in_memory_are_not_confused_by_their_suffix(tmp_path):
    """The output's format is that of its suffix, whatever the input really was."""
    buffer = io.BytesIO()
    Image.fromarray(draw()).save(buffer, "PNG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    restore_file(tmp_path / "a.jpg", tmp_path / "b.png")
    np.testing.assert_array_equal(upright(tmp_path / "b.png", None), draw())


def test_ratings_of_a_tiff_are_kept(tmp_path):
    tags = [(18246, "H", 1, 4, True), (40094, "B", 4, b"k\0\0\0", True)]
    tifffile.imwrite(tmp_path / "a.tif", draw(np.uint8), photometric="rgb", extratags=tags)
    write_image(tmp_path / "b.tif", read_image(tmp_path / "a.tif"))
    with tifffile.TiffFile(tmp_path / "b.tif") as after:
        kept = after.pages.first.aspage().tags
        assert (kept.valueof(18246), kept[40094].count) == (4, 4)


@pytest.mark.parametrize("what", ["exif", "xmp"])
def test_metadata_that_a_jpeg_has_no_room_for_is_left_out_with_a_word(what, tmp_path):
    long: dict = {what: b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(66000)}
    write_image(tmp_path / "a.png", Picture(draw(np.uint8), icc_profile=ICC, **long))
    picture = read_image(tmp_path / "a.png")
    assert len(getattr(picture, what)) > 65536
    with pytest.warns(UserWarning, match=f"a.jpg: .jpg cannot hold {what.upper()} data of over 64 KB; write .png"):
        write_image(tmp_path / "a.jpg", picture)
    kept = read_image(tmp_path / "a.jpg")
    assert (kept.icc_profile, getattr(kept, what)) == (ICC, None)


def test_an_orientation_that_is_damaged_is_told_in_training_too(tmp_path):
    Image.fromarray(draw(np.uint8)).save(tmp_path / "a.jpg", exif=exif(6))
    assert read_rgb8(tmp_path / "a.jpg").shape[1:] == draw().shape[1::-1]
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(
        content.replace(b"Exif\0\0MM", b"Exif\0\0QQ").replace(b"Exif\0\0II", b"Exif\0\0QQ")
    )
    with pytest.warns(UserWarning, match="a.jpg: its EXIF data is damaged and left out"):
        assert read_rgb8(tmp_path / "a.jpg").shape[1:] == draw().shape[:2]
