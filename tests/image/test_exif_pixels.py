"""What EXIF says in pixels stays true of an image that is turned upright and enlarged."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from serpent_ir.image import read_image, write_image

WIDTH, HEIGHT = 24, 16
X, Y = 5, 3
AREA, LOCATION, PER_X, PER_Y, SIZE_X, SIZE_Y = 37396, 41492, 41486, 41487, 40962, 40963


def photo(orientation: int, form: str, byte_order: str) -> bytes:
    """A photo that is white where its EXIF data say that its subject is."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[Y, X] = 255
    exif = Image.Exif()
    exif.endian = byte_order
    exif[274] = orientation
    inner = {
        AREA: (X, Y, 4, 2),
        LOCATION: (X, Y),
        PER_X: IFDRational(100),
        PER_Y: IFDRational(200),
        SIZE_X: WIDTH,
        SIZE_Y: HEIGHT,
    }
    exif.get_ifd(0x8769).update(inner)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


@pytest.mark.parametrize(("form", "suffix"), [("PNG", ".png"), ("WEBP", ".webp"), ("JPEG", ".jpg")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_subject_is_where_it_was(orientation, form, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(photo(orientation, form, "<" if orientation % 2 else ">"))
    picture = read_image(tmp_path / f"a{suffix}")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(photo(orientation, "PNG", "<"))))
    (y,), (x,) = np.nonzero(np.asarray(upright)[..., 0])
    for scale in (1, 4):
        write_image(tmp_path / "b.png", replace(picture, pixels=picture.pixels.repeat(scale, 0).repeat(scale, 1)))
        with Image.open(tmp_path / "b.png") as written:
            tags = written.getexif().get_ifd(0x8769)
        turned = orientation > 4
        width, height = (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT)
        assert (tags[SIZE_X], tags[SIZE_Y]) == (width * scale, height * scale)
        assert tags[LOCATION] == (x * scale, y * scale)
        assert tags[AREA] == (x * scale, y * scale, *((2 * scale, 4 * scale) if turned else (4 * scale, 2 * scale)))
        assert (tags[PER_X], tags[PER_Y]) == ((200 * scale, 100 * scale) if turned else (100 * scale, 200 * scale))
