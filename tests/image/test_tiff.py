"""TIFFs: kinds of samples, what they say beside their pixels, and their pages, read back by other readers."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from image_files import draw
from serpent_ir import Restorer
from serpent_ir.errors import ImageError
from serpent_ir.files import Source
from serpent_ir.image import read_image, write_image
from serpent_ir.image.tiff import TiffRows


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


class Enlarged(torch.nn.Module):
    """Each pixel becomes `scale` x `scale` of the same."""

    size_multiple = 1

    def __init__(self, scale: int):
        super().__init__()
        self.scale, self.weight = scale, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def restored(file: Path, scale: int = 1, pages: str = "first", suffix: str = ".tif") -> tuple[Path, list[str]]:
    """What becomes of a file, and what is told."""
    target = file.with_name(f"restored{suffix}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        source = Source(file).load(pages)
        source.restore(Restorer(Enlarged(scale)), target, lambda *_: None, pages=pages).write()
    return target, [str(one.message) for one in told]


STACK = np.stack([draw(np.uint16, 10, 12, 1, seed)[..., 0] for seed in range(6)])
UM = {"resolution": (10, 5), "imagej": True}


def stacks(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Files of six planes, as they are read."""
    colour = np.stack([draw(np.uint8, 10, 12, 3, seed) for seed in range(6)])
    ranges, labels = [1.0, 2.0, 3.0, 4.0], list("abcdef")
    ome = {"axes": "ZCYX", "PhysicalSizeX": 0.1, "PhysicalSizeXUnit": "\u00b5m", "Channel": {"Name": ["a", "b"]}}
    grey: dict[str, Any] = {"photometric": "minisblack"}
    scan: dict[str, Any] = {"resolution": (300, 300), "resolutionunit": 2, "compression": "zlib", "tile": (16, 16)}
    z = {"axes": "ZYX", "unit": "um", "spacing": 0.3, "Labels": labels}
    hyper = STACK.reshape(3, 2, 10, 12)
    files: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "imagej": (STACK, {**UM, "metadata": z}),
        "hyper": (hyper, {**UM, "metadata": {"axes": "TCYX", "unit": "um", "Ranges": ranges}}),
        "colour": (colour, {"imagej": True, "metadata": {"axes": "ZYXS"}}),
        "ome": (hyper, {**grey, "ome": True, "metadata": ome}),
        "plain": (STACK, grey),
        "big": (STACK, {**grey, "bigtiff": True, "byteorder": ">"}),
        "scan": (colour, {"photometric": "rgb", "metadata": None, **scan}),
    }
    made = {}
    for name, (array, options) in files.items():
        made[name] = (folder / f"{name}.tif", array)
        tifffile.imwrite(made[name][0], array, **options)
    # A large stack of ImageJ has one directory, and its planes one after the other.
    buffer = io.BytesIO()
    text = "ImageJ=1.53t\nimages=6\nslices=6\nunit=micron\n"
    first = {"photometric": "minisblack", "metadata": None, "byteorder": ">", "description": text}
    tifffile.imwrite(buffer, STACK[0], resolution=(10, 5), resolutionunit=1, **first)
    made["one"] = (folder / "one.tif", STACK)
    made["one"][0].write_bytes(buffer.getvalue() + STACK[1:].astype(">u2").tobytes())
    return made


KINDS = ["imagej", "hyper", "colour", "ome", "plain", "big", "scan", "one"]


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_the_first_page_alone_says_that_it_is_alone(name, scale, tmp_path):
    file, planes = stacks(tmp_path)[name]
    target, told = restored(file, scale)
    assert any("holds 6 pages; the first is taken; --pages all restores each" in one for one in told)
    first = planes.reshape(6, *planes.shape[-3 if planes.shape[-1] == 3 else -2 :])[0]
    with tifffile.TiffFile(target) as tiff:
        assert len(tiff.pages) == len(tiff.series) == 1
        after = tiff.series[0].asarray()
        assert np.array_equal(after, first.repeat(scale, 0).repeat(scale, 1))
        page = tiff.pages.first.aspage()
        text = page.description
        assert "images=" not in text
        assert "shape" not in text
        if name in ("imagej", "hyper", "one"):
            assert tiff.is_imagej
            assert "unit=" in text
            x, y = (page.tags.valueof(tag) for tag in (282, 283))
            assert (x[0] / x[1], y[0] / y[1], page.tags.valueof(296)) == (10 * scale, 5 * scale, 1)
        if name == "imagej":
            assert tiff.imagej_metadata is not None
            assert (tiff.imagej_metadata["spacing"], tiff.imagej_metadata["Labels"]) == (0.3, "a")
        if name == "ome":
            says = [
                f'Size{axis}="{size}"' in text
                for axis, size in zip("XYCZT", (12 * scale, 10 * scale, 1, 1, 1), strict=True)
            ]
            assert all(says)
            assert f'PhysicalSizeX="{0.1 / scale:.12g}"' in text
            assert text.count("<Channel") == text.count("<TiffData") == 1


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_all_pages_are_a_file_of_the_same_kind(name, scale, large, tmp_path, monkeypatch):
    file, planes = stacks(tmp_path)[name]
    if large:  # by rows, where they can be read so
        monkeypatch.setattr("serpent_ir.files.source.LARGE", 1)
        monkeypatch.setattr("serpent_ir.files.source.decode", None)
    target, told = restored(file, scale, "all")
    assert told == []
    with tifffile.TiffFile(file) as before, tifffile.TiffFile(target) as after:
        assert after.series[0].kind == before.series[0].kind
        assert len(after.pages) == 6
        axis = planes.ndim - (3 if planes.shape[-1] == 3 else 2)
        assert np.array_equal(after.series[0].asarray(), planes.repeat(scale, axis).repeat(scale, axis + 1))
        if before.imagej_metadata:
            assert str(after.imagej_metadata) == str(before.imagej_metadata)


def test_pages_of_several_kinds_and_their_own_metadata(tmp_path):
    file = tmp_path / "a.tif"
    pages = [Image.fromarray(draw(seed=seed, height=10 + seed)) for seed in range(2)] + [
        Image.fromarray(draw()).quantize(9)
    ]
    texts = ["one", "two"]
    with tifffile.TiffWriter(file) as writer:
        for page, text in zip(pages[:2], texts, strict=False):
            writer.write(np.asarray(page), photometric="rgb", metadata=None, description=text)
        writer.write(np.asarray(pages[2]), photometric="palette", colormap=_colours(pages[2]), metadata=None)
        writer.write(np.asarray(pages[0])[::2, ::2].copy(), photometric="rgb", subfiletype=1, metadata=None)
    target, told = restored(file, 1, "all")
    assert told == [f"{file}: holds 1 smaller copy or mask of its pages; left out"]
    with Image.open(target) as after:
        assert after.n_frames == 3
        for index, page in enumerate(pages):
            after.seek(index)
            assert np.array_equal(np.asarray(after.convert("RGB")), np.asarray(page.convert("RGB")))
            assert after.tag_v2.get(270) == (texts[index] if index < 2 else None)


def _colours(image: Image.Image) -> np.ndarray:
    palette = np.zeros((256, 3), np.uint16)
    values = np.array(image.getpalette(), np.uint16).reshape(-1, 3)
    palette[: len(values)] = values * 257
    return palette.T.copy()


def test_all_pages_need_a_tiff(tmp_path):
    frames = [Image.fromarray(draw(seed=seed)).quantize(16) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"a\.gif: holds 3 images and is no TIFF, and --pages all is for those"):
        restored(tmp_path / "a.gif", 1, "all")
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    with pytest.raises(ImageError, match=r"a\.tif: holds 6 pages, which \.png does not; choose \.tif"):
        restored(tmp_path / "a.tif", 1, "all", ".png")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) - 900])
    with pytest.raises(ImageError, match=r"a\.tif: page \d: is cut short|damaged"):
        restored(tmp_path / "a.tif", 1, "all")
    assert not (tmp_path / "restored.tif").exists()
    tifffile.imwrite(tmp_path / "one.tif", STACK[0])
    assert restored(tmp_path / "one.tif", 1, "all")[1] == []


GEO = {
    33550: ("d", (0.5, 0.25, 0.0)),
    33922: ("d", (3.0, 2.0, 0.0, 500000.0, 4000000.0, 0.0)),
    34735: ("H", (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)),
    34736: ("d", (6378137.0,)),
    42113: ("s", "0"),
    42112: ("s", "<GDALMetadata><Item name='A'>b</Item></GDALMetadata>"),
}


def geo(file: Path, tags: dict[int, tuple[str, Any]], *more: tuple[int, str, int, Any, bool]) -> None:
    extra = [(tag, kind, 0 if kind == "s" else len(value), value, True) for tag, (kind, value) in tags.items()]
    tifffile.imwrite(file, draw(), photometric="rgb", metadata=None, extratags=[*extra, *more])


def tag(file: Path, number: int) -> Any:
    with tifffile.TiffFile(file) as tiff:
        return tiff.pages.first.aspage().tags.valueof(number)


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("scale", [1, 4])
def test_a_place_on_the_map_stays_where_it_is(scale, point, tmp_path):
    keys = GEO[34735][1]
    tags = {**GEO, 34735: ("H", tuple(2 if at == 11 and point else key for at, key in enumerate(keys)))}
    geo(tmp_path / "a.tif", tags)
    target, told = restored(tmp_path / "a.tif", scale)
    assert told == []
    for number in (34735, 34736, 42112, 42113):
        assert tag(target, number) == tag(tmp_path / "a.tif", number)
    half = 0.5 if point else 0
    (sx, sy, _), tie = tag(target, 33550), tag(target, 33922)
    assert (sx, sy, tie[3:5]) == (0.5 / scale, 0.25 / scale, (500000.0, 4000000.0))
    # The upper left corner of the image is where it was.
    assert tie[3] - (tie[0] + half) * sx == 500000 - (3 + half) * 0.5
    assert tie[4] + (tie[1] + half) * sy == 4000000 + (2 + half) * 0.25
    matrix = {34264: ("d", (0.5, 0.1, 0.0, 7.0, 0.2, -0.25, 0.0, 9.0, 0, 0, 0, 0, 0, 0, 0, 1.0)), 34735: tags[34735]}
    geo(tmp_path / "m.tif", matrix)
    before, after = (
        np.reshape(tag(file, 34264), (4, 4)) for file in (tmp_path / "m.tif", restored(tmp_path / "m.tif", scale)[0])
    )
    for x, y in ((0, 0), (37, 23)):  # corners
        at = [np.array([x * f - half, y * f - half, 0, 1]) for f in (1, scale)]
        assert np.allclose(before @ at[0], after @ at[1])


def test_what_cannot_be_kept_of_it_is_told(tmp_path):
    geo(tmp_path / "a.tif", GEO, (274, "H", 1, 6, True), (65000, "s", 0, "of a microscope", True))
    target, told = restored(tmp_path / "a.tif")
    assert any("place on the map (GeoTIFF) and is turned upright; its place is left out" in one for one in told)
    assert any("has data of other programs in tags (65000); left out" in one for one in told)
    assert tag(target, 33550) is None
    assert tag(target, 42113) == "0"
    geo(tmp_path / "b.tif", GEO)
    _, told = restored(tmp_path / "b.tif", suffix=".png")
    lost = "its place on the map (GeoTIFF), GDAL's metadata"
    assert told == [f"{tmp_path / 'restored.png'}: .png cannot hold {lost}; write .tif to keep everything"]
    tifffile.imwrite(tmp_path / "c.tif", STACK, **UM, metadata={"axes": "ZYX", "unit": "um"})
    target, told = restored(tmp_path / "c.tif", suffix=".png")
    assert "a description of ImageJ or OME with its scale" in told[-1]
    assert b"ImageJ" not in target.read_bytes()
    tifffile.imwrite(
        tmp_path / "d.tif", STACK, photometric="minisblack", metadata=None, description="SI.hStackManager.numSlices = 6"
    )
    target, told = restored(tmp_path / "d.tif")
    assert "has a description of ScanImage that speaks of other planes; left out" in told[-1]
    assert tag(target, 270) is None


REGIONS = {"ROI": b"Iout" + bytes(60), "Overlays": [b"Iout" + bytes(60)] * 2}


@pytest.mark.parametrize("pages", ["first", "all"])
@pytest.mark.parametrize("scale", [1, 2])
def test_regions_of_interest_are_kept_or_told(scale, pages, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, metadata={"axes": "ZYX", **REGIONS})
    target, told = restored(tmp_path / "a.tif", scale, pages)
    with tifffile.TiffFile(target) as tiff:
        assert tiff.imagej_metadata is not None
        kept = {name for name in REGIONS if name in tiff.imagej_metadata}
    of_all = f"{tmp_path / 'a.tif'}: has overlays of ImageJ for all its planes; left out"
    of_size = "ImageJ's regions of interest, which are for its old size"
    assert kept == (set() if scale == 2 else {"ROI"} if pages == "first" else set(REGIONS))
    assert (of_all in told) == (pages == "first")
    assert any(of_size in one for one in told) == (scale == 2)

    tifffile.imwrite(tmp_path / "o.tif", STACK, photometric="minisblack", ome=True, metadata={"axes": "ZYX"})
    text = tag(tmp_path / "o.tif", 270).replace("</Image>", '<ROIRef ID="ROI:0"/></Image>')
    region = '<ROI ID="ROI:0"><Union><Point ID="Shape:0" X="1" Y="2"/></Union></ROI></OME>'
    tifffile.tiffcomment(tmp_path / "o.tif", text.replace("</OME>", region).encode())
    target, told = restored(tmp_path / "o.tif", scale, pages)
    assert ("<ROI " in tag(target, 270)) == (scale == 1 and pages == "all")
    of_all = f"{tmp_path / 'o.tif'}: has regions of interest of OME, which speak of all its planes; left out"
    assert (of_all in told) == (pages == "first")
    of_size = "OME's regions of interest, which are for its old size"
    assert any(of_size in one for one in told) == (scale == 2 and pages == "all")


def test_what_another_size_loses_is_told_by_rows_too(tmp_path, monkeypatch):
    rpc = (50844, "d", 92, (0.5,) * 92, True)
    regions: dict[str, Any] = {"imagej": True, "metadata": {"ROI": REGIONS["ROI"]}, "extratags": [rpc]}
    tifffile.imwrite(tmp_path / "a.tif", STACK[0], **regions)
    outcomes = []
    for least in (1 << 25, 1):
        monkeypatch.setattr("serpent_ir.files.source.LARGE", least)
        assert Source(tmp_path / "a.tif").large == (least == 1)
        target, told = restored(tmp_path / "a.tif", 2)
        outcomes.append((told, target.read_bytes()))
    lost = "its rational polynomials (RPC), which are for its old size, ImageJ's regions of interest, which are for its"
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == [f"{target}: .tif cannot hold {lost} old size"]


def test_a_person_s_words_and_a_resolution_without_unit_survive(tmp_path):
    options: dict[str, Any] = {
        "photometric": "rgb",
        "metadata": None,
        "resolution": ((7, 3), (5, 2)),
        "resolutionunit": 1,
    }
    tifffile.imwrite(tmp_path / "a.tif", draw(), description="5 slices of cake, \u00bd \u00b5m".encode(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "b.tif", read_image(tmp_path / "a.tif"))
    for number in (270, 282, 283, 296):
        assert tag(tmp_path / "b.tif", number) == tag(tmp_path / "a.tif", number)


def test_no_resolution_is_made_up(tmp_path):
    bare = tmp_path / "bare.tif"
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(bare)
    assert read_image(bare).dpi is None
    for suffix in (".tif", ".png", ".jpg"):
        write_image(tmp_path / f"out{suffix}", read_image(bare))
        assert read_image(tmp_path / f"out{suffix}").dpi is None
