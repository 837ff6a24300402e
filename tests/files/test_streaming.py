"""Large TIFF files: read by rows, restored in tiles, written by strips, the same bits as in memory and less of it."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from image_files import ICC, draw, exif, tags_of
from networks import small_network
from serpent_ir.errors import ImageError
from serpent_ir.files import Source
from serpent_ir.files import source as streaming
from serpent_ir.image import read_image, write_image
from serpent_ir.image.tiff import TiffRows
from serpent_ir.inference import Restorer

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

LAYOUTS = [
    {},
    {"rowsperstrip": 7},
    {"tile": (16, 32)},
    {"compression": "zlib"},
    {"compression": "zlib", "predictor": True, "rowsperstrip": 5},
    {"compression": "zlib", "predictor": True, "tile": (48, 16)},
    {"byteorder": ">", "compression": "zlib", "predictor": True},
    {"bigtiff": True, "rowsperstrip": 10},
]


def save_tiff(path: Path, channels: int, dtype: type, **options: object) -> np.ndarray:
    array = draw(dtype, 61, 75, channels)
    array = array[..., 0] if channels == 1 else array
    more: dict = {"photometric": "rgb" if channels > 2 else "minisblack", "metadata": None, **options}
    if channels > 1:
        more |= {"planarconfig": "contig", "extrasamples": ["unassalpha"] * (channels in (2, 4))}
    tifffile.imwrite(path, array, **more)
    return array


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_rows_are_those_of_the_file(layout, dtype, channels, tmp_path):
    expected = save_tiff(tmp_path / "a.tif", channels, dtype, **layout).reshape(61, 75, channels)
    with (tmp_path / "a.tif").open("rb") as file:
        rows = TiffRows(file)
        assert (rows.height, rows.width, rows.samples, rows.dtype) == (61, 75, channels, dtype)
        for span in [(0, 1), (0, 20), (13, 33), (30, 61), (60, 61)]:
            np.testing.assert_array_equal(rows.read(span), expected[slice(*span)])


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "separate"},
        {"photometric": "miniswhite"},
        {"extratags": [(274, "H", 1, 6, True)]},
        "pages",
        "cut",
    ],
)
def test_what_is_not_read_by_rows_is_refused(options, tmp_path):
    array, path = draw(np.uint16), tmp_path / "a.tif"
    if options == "pages":
        tifffile.imwrite(path, np.stack([array, array]), photometric="rgb")
    elif options == "cut":
        tifffile.imwrite(path, array, photometric="rgb")
        path.write_bytes(path.read_bytes()[:-1])
    elif "planarconfig" in options:
        tifffile.imwrite(path, array.transpose(2, 0, 1), photometric="rgb", **options)
    else:
        tifffile.imwrite(path, array[..., 0], **{"photometric": "minisblack", **options})
    with path.open("rb") as file, pytest.raises(ImageError):
        TiffRows(file)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("tile", ["none", 32])
def test_by_rows_is_as_in_memory(dtype, channels, tile, tmp_path, monkeypatch):
    about: dict = {"iccprofile": ICC, "resolution": (300, 150), "resolutionunit": "INCH"}
    save_tiff(tmp_path / "a.tif", channels, dtype, rowsperstrip=8, **about)
    picture = read_image(tmp_path / "a.tif")
    write_image(tmp_path / "a.tif", dataclasses.replace(picture, exif=exif()))
    restorer = Restorer(small_network(), tile=tile, tile_overlap=8)

    def restored(name: str) -> Path:
        Source(tmp_path / "a.tif").load().restore(restorer, tmp_path / name, lambda done, total: None).write()
        return tmp_path / name

    in_memory = restored("memory.tif")
    monkeypatch.setattr(streaming, "LARGE", 1)
    whole_reads: list[Path] = []
    monkeypatch.setattr(streaming, "read_image", whole_reads.append)
    by_rows = restored("rows.tif")
    assert not whole_reads
    np.testing.assert_array_equal(tifffile.imread(by_rows), tifffile.imread(in_memory))
    assert (tifffile.imread(by_rows) != tifffile.imread(tmp_path / "a.tif")).any()
    first, second = read_image(in_memory), read_image(by_rows)
    assert (first.icc_profile, first.dpi, first.mode) == (second.icc_profile, second.dpi, second.mode)
    assert first.icc_profile == ICC
    assert tags_of(first.exif) == tags_of(second.exif)
    assert tags_of(second.exif)[271] == "Maker"


def test_a_large_file_of_another_kind_is_restored_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LARGE", 1)
    cmyk = Image.fromarray(draw(channels=4)[..., :4], "CMYK")
    cmyk.save(tmp_path / "a.tif")
    Image.fromarray(draw()).save(tmp_path / "b.png")
    restorer = Restorer(small_network())
    with pytest.warns(UserWarning, match="is CMYK"):
        Source(tmp_path / "a.tif").load().restore(restorer, tmp_path / "out.tif", lambda d, t: None).write()
    Source(tmp_path / "b.png").load().restore(restorer, tmp_path / "out.png", lambda d, t: None).write()
    assert read_image(tmp_path / "out.tif").pixels.shape == read_image(tmp_path / "out.png").pixels.shape == (23, 37, 3)


def test_damage_within_a_large_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LARGE", 1)
    save_tiff(tmp_path / "a.tif", 3, np.uint8, compression="zlib", rowsperstrip=8)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages.first.aspage().dataoffsets[5]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + 20] = b"\xff" * 20
    (tmp_path / "a.tif").write_bytes(data)
    restorer = Restorer(small_network(), tile=32, tile_overlap=8)
    with pytest.raises(ImageError, match=r"a\.tif: is damaged or cut short"):
        Source(tmp_path / "a.tif").load().restore(restorer, tmp_path / "b.tif", lambda d, t: None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


MEASURE = """
import json, pathlib, re, sys
from networks import small_network
from serpent_ir.inference.restorer import Restorer, restore
from serpent_ir.files.source import Source
import torch
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
restorer = Restorer(small_network(), tile=512)
restorer(torch.rand(3, 512, 512))
before = kilobytes("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
tiles = []
source, target = map(pathlib.Path, sys.argv[1:])
Source(source).load().restore(restorer, target, lambda done, total: tiles.append(total)).write()
print(json.dumps({"taken": (kilobytes("VmHWM") - before) * 1024, "tiles": tiles[-1]}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks of memory from /proc")
def test_memory_is_bounded_by_the_tiles_and_not_by_the_image(tmp_path):
    """36 megapixels here; benchmarks/results has 100. In memory it would take 108 MB twice, and floats of 864 MB."""
    band = draw(height=64, width=6000)
    tifffile.imwrite(tmp_path / "a.tif", np.tile(band, (94, 1, 1))[:6000], photometric="rgb", rowsperstrip=64)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a.tif", tmp_path / "b.tif"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["tiles"] == 13 * 13
    assert result["taken"] < 400e6
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert file.pages.first.shape == (6000, 6000, 3)


def test_writing_to_any_file_object():
    from serpent_ir.image import Picture
    from serpent_ir.image.tiff import write_tiff

    buffer = io.BytesIO()
    array = draw(np.uint16, 100, 30)
    parts = (array[top : top + 33] for top in range(0, 100, 33))
    write_tiff(buffer, Picture(array[:0]), parts, array.shape, np.uint16)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(buffer.getvalue())), array)
