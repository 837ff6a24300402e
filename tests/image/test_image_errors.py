"""Damaged files, full disks and wrong calls: the image, or one line, and no half-written file."""

import io
import os
import random
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from image_files import ICC, draw, exif, same
from serpent_ir.errors import ImageError, UsageError
from serpent_ir.image import Picture, decoding, read_image, write_image
from serpent_ir.image.encoders import encode

DAMAGED = ["png", "jpg", "webp", "tif", "bmp", "progressive.jpg", "png16", "tif16", "lzw16.tif", "raw16.tif"]


def files_to_damage() -> dict[str, bytes]:
    files = {}
    for suffix, options in {"png": {}, "jpg": {}, "webp": {}, "tif": {"compression": "tiff_lzw"}, "bmp": {}}.items():
        buffer = io.BytesIO()
        Image.fromarray(draw()).save(
            buffer,
            {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix),
            exif=b"" if suffix == "tif" else exif(6),
            **options,
        )
        files[suffix] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(draw()).save(buffer, "JPEG", progressive=True, icc_profile=ICC)
    files["progressive.jpg"] = buffer.getvalue()
    for name in ("png16", "tif16"):
        deep = Picture(draw(np.uint16), icc_profile=ICC, dpi=(72, 72))
        files[name] = encode(deep, f".{name[:3]}")
    files["lzw16.tif"] = cv2.imencode(".tif", draw(np.uint16), [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1].tobytes()
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, draw(np.uint16), photometric="rgb")
    files["raw16.tif"] = buffer.getvalue()
    return files


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_give_the_image_or_an_image_error(name, tmp_path, capfd):
    whole = files_to_damage()[name]
    file = tmp_path / "a"
    file.write_bytes(whole)
    expected = read_image(file)
    chance = random.Random(0)
    cuts = {*range(1, min(len(whole), 60)), *(len(whole) - n for n in range(1, 20))}
    cuts |= {chance.randrange(1, len(whole)) for _ in range(80)}
    refused = 0
    for cut in cuts:
        file.write_bytes(whole[:cut])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                after = read_image(file)
        except ImageError as error:
            refused += 1
            assert str(error).startswith(f"{file}: ")
            assert "\n" not in str(error)
        else:  # what was cut is not the image
            assert same(after.pixels, expected.pixels), cut
    assert refused > len(cuts) * 0.7
    for _ in range(60):  # flipped bytes: any result but another exception
        position = chance.randrange(len(whole))
        file.write_bytes(whole[:position] + bytes([chance.randrange(256)]) + whole[position + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_image(file)
            except ImageError as error:
                assert "\n" not in str(error)
    if "tif" not in name:  # Pillow's libtiff writes to stderr from C
        assert capfd.readouterr().err == ""


def test_errors_of_reading(tmp_path, monkeypatch):
    def check(file: Path, message: str):
        with pytest.raises(ImageError, match=message) as caught:
            read_image(file)
        assert str(caught.value).startswith(f"{file}: ")

    check(tmp_path / "none.png", "No such file")
    check(tmp_path, "directory")
    (tmp_path / "empty.png").touch()
    check(tmp_path / "empty.png", "is empty")
    (tmp_path / "text.png").write_text("hello world " * 50)
    check(tmp_path / "text.png", "not an image")
    write_image(tmp_path / "big.png", Picture(draw()))
    write_image(tmp_path / "big.tif", Picture(draw(np.uint16)))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 23 * 37 - 1)
    check(tmp_path / "big.png", "37x23 px, over the bound")
    check(tmp_path / "big.tif", "37x23 px, over the bound")
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own bound would refuse it
    assert read_image(tmp_path / "big.png").pixels.shape == (23, 37, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    check(tmp_path / "big.png", "Permission denied")


def test_errors_of_writing(tmp_path, monkeypatch):
    drawn = Picture(draw())
    for name in ("a.gif", "a", "a.png.zip"):
        with pytest.raises(ImageError, match=r"cannot write .*use \.png"):
            write_image(tmp_path / name, drawn)
    with pytest.raises(ImageError, match="No such file"):
        write_image(tmp_path / "none" / "a.png", drawn)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="cannot be written"):
        write_image(tmp_path / "folder.png", drawn)
    with pytest.raises(ImageError, match=r"a\.webp: cannot be written in this format"):
        write_image(tmp_path / "a.webp", Picture(np.zeros((1, 20000, 3), np.uint8)))
    with pytest.raises(UsageError, match="expected alpha"):
        write_image(tmp_path / "a.png", Picture(draw(), np.zeros((5, 5), np.uint8)))
    with pytest.raises(UsageError, match="expected pixels"):
        write_image(tmp_path / "a.png", Picture(draw().astype(np.float32)))  # pyright: ignore[reportArgumentType]
    assert os.listdir(tmp_path) == ["folder.png"]  # noqa: PTH208
    assert not list((tmp_path / "folder.png").iterdir())


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file(where, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    write_image(file, Picture(draw()))
    old = file.read_bytes()

    def fail(*_args):
        raise OSError(28, "No space left on device")

    if where == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        plain_open = Path.open

        def open_full_disk(self, mode="r", *args, **kwargs):
            opened = plain_open(self, mode, *args, **kwargs)
            return opened if "r" in mode else FullDisk(opened)

        class FullDisk:
            def __init__(self, opened):
                self.opened = opened

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.opened.close()

            def __getattr__(self, name):
                return getattr(self.opened, name)

            def write(self, data):
                self.opened.write(data[:10])
                fail()

        monkeypatch.setattr(Path, "open", open_full_disk)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written: No space left"):
        write_image(file, Picture(draw(seed=1)))
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
