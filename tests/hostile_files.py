"""Files that nobody should have to open: made here, by name, for `test_hostile.py`."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import tifffile
from PIL import Image, features

from image_files import ICC, draw, exif
from serpent_ir.image import Picture
from serpent_ir.image.encoders import encode

PNG = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "rgb" if array.ndim == 3 else "minisblack", **options})  # pyright: ignore
    return buffer.getvalue()


def whole_files() -> dict[str, bytes]:
    """A sound file of each kind."""
    image = Image.fromarray(draw())
    files = {
        "rgb.png": saved(image, "PNG", icc_profile=ICC, exif=exif(6), dpi=(72, 72)),
        "palette.png": saved(image.quantize(8), "PNG"),
        "deep.png": encode(Picture(draw(np.uint16), icc_profile=ICC), ".png"),
        "plain.jpg": saved(image, "JPEG", icc_profile=ICC, exif=exif(6)),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "lossless.webp": saved(image, "WEBP", lossless=True, exif=exif(3)),
        "plain.tif": saved(image, "TIFF", compression="tiff_lzw"),
        "deep.tif": tiff(draw(np.uint16), compression="zlib", rowsperstrip=5),
        "plain.bmp": saved(image, "BMP"),
        "plain.gif": saved(image, "GIF"),
        "plain.ppm": saved(image, "PPM"),
        "plain.tga": saved(image, "TGA"),
    }
    if features.check("avif"):
        files["plain.avif"] = saved(image, "AVIF")
    return files


def structure(name: str, data: bytes) -> list[int]:
    """Where the parts of a file begin, and the places just behind those."""
    marks: set[int] = {0, 1, 2, 4, 8, len(data) // 2, len(data) - 1}
    kind = name.rpartition(".")[2]
    if kind == "png":
        place = 8
        while place < len(data):
            marks |= {place, place + 4, place + 8, place + 9}
            place += 12 + struct.unpack_from(">I", data, place)[0]
    elif kind == "jpg":
        marks |= {i for i in range(len(data) - 1) if data[i] == 0xFF and 0xC0 <= data[i + 1] <= 0xFE}
    elif kind in ("webp", "avif"):
        marks |= {i for i in range(4, min(len(data), 400)) if data[i : i + 4].isalnum() and data[i : i + 4].isascii()}
    elif kind == "tif":
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first.aspage()
            marks |= {page.offset, page.offset + 2, *(tag.offset for tag in page.tags), *page.dataoffsets}
    elif kind in ("bmp", "tga", "gif", "ppm"):
        marks |= {3, 5, 10, 13, 14, 18, 22, 26, 30, 54, 60}
    return sorted(mark for mark in marks if mark < len(data))


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "bomb_square.png", png(2**31 - 1, 2**31 - 1)
    yield "bomb_50000.png", png(50000, 50000, b"\0" * 10_000_000)
    yield "bomb_deep.png", png(60000, 60000, depth=16, colour=6)
    yield "bomb_zero.png", png(0, 0)
    yield "bomb_wide.png", png(2**31 - 1, 1)
    yield "bomb_profile.png", png(4, 4, b"\0" * 52, extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 200_000_000)))
    yield "bomb_text.png", png(4, 4, b"\0" * 52, extra=chunk(b"zTXt", b"x\0\0" + zlib.compress(b"\0" * 200_000_000)))
    jpeg = saved(Image.fromarray(draw()), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    yield "bomb.jpg", patched(jpeg, frame + 5, struct.pack(">HH", 65500, 65500))
    bmp = saved(Image.fromarray(draw()), "BMP")
    yield "bomb.bmp", patched(bmp, 18, struct.pack("<ii", 60000, 60000))
    yield "bomb_negative.bmp", patched(bmp, 18, struct.pack("<ii", -5, 5))
    gif = saved(Image.fromarray(draw()), "GIF")
    yield "bomb.gif", patched(gif, 6, struct.pack("<HH", 65535, 65535))
    for depth in (np.uint8, np.uint16):
        data = bytearray(tiff(draw(depth)))
        with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
            tags = file.pages.first.aspage().tags
            for tag in (256, 257):
                struct.pack_into("<I", data, tags[tag].valueoffset, 100_000)
        yield f"bomb_{depth.__name__}.tif", bytes(data)


def odd_samples() -> Iterator[tuple[str, bytes]]:
    samples = draw().astype(np.float32) / 255
    for name, value in (("nan", np.nan), ("infinity", np.inf), ("large", 1e30)):
        yield f"float_{name}.tif", tiff(np.where(samples > 0.9, np.float32(value), samples))
    yield "float64.tif", tiff(samples.astype(np.float64))
    yield "half.tif", tiff(samples.astype(np.float16))
    yield "int32.tif", tiff(draw().astype(np.int32))
    yield "int8.tif", tiff(draw().astype(np.int8))
    yield "complex.tif", tiff(samples[..., 0].astype(np.complex64))
    yield "five_channels.tif", tiff(draw(channels=5), extrasamples=["unspecified"] * 2, planarconfig="contig")
    yield "volume.tif", tiff(np.stack([draw(channels=1)[..., 0]] * 4), volumetric=True)
    yield "bilevel.png", saved(Image.fromarray(draw()).convert("1"), "PNG")
    yield "cmyk.jpg", saved(Image.fromarray(draw()).convert("CMYK"), "JPEG")
    yield "lab.tif", saved(Image.fromarray(draw()).convert("LAB"), "TIFF")
    yield "float.tif", saved(Image.fromarray(samples[..., 0]), "TIFF")


def animations() -> Iterator[tuple[str, bytes]]:
    frames = [Image.fromarray(draw(seed=seed)) for seed in range(3)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        yield f"animated.{format.lower()}", saved(frames[0], format, save_all=True, append_images=frames[1:])


def damaged_metadata() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(draw())
    loop = b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"  # a directory that holds itself
    directories = {
        "noise": np.random.default_rng(0).bytes(200),
        "header": b"Exif\0\0II*\0",
        "beyond": b"Exif\0\0II*\0\xff\xff\xff\x7f",
        "count": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        "loop": b"Exif\0\0" + loop,
        "orientation": exif(99),
        "cut": exif(6)[:-20],
    }
    for name, data in directories.items():
        data = data if data.startswith(b"Exif\0\0") else b"Exif\0\0" + data
        yield f"exif_{name}.jpg", saved(image, "JPEG", exif=data)
        content = chunk(b"eXIf", data.removeprefix(b"Exif\0\0"))
        sound = saved(image, "PNG")
        yield f"exif_{name}.png", sound[:33] + content + sound[33:]
        yield f"exif_{name}.webp", saved(image, "WEBP", lossless=True, exif=data)
    for name, data in {"noise": np.random.default_rng(1).bytes(500), "cut": ICC[:100], "short": b"x"}.items():
        yield f"icc_{name}.jpg", saved(image, "JPEG", icc_profile=data)
        yield f"icc_{name}.png", saved(image, "PNG", icc_profile=data)
        yield f"icc_{name}.tif", saved(image, "TIFF", icc_profile=data)
        yield f"icc_{name}_cmyk.jpg", saved(image.convert("CMYK"), "JPEG", icc_profile=data)
    sound = saved(image, "PNG")
    yield "icc_not_deflated.png", sound[:33] + chunk(b"iCCP", b"x\0\0not deflated") + sound[33:]
    for name, dpi in {"zero": (0, 0), "huge": (2**31 - 1, 2**31 - 1)}.items():
        yield f"dpi_{name}.png", sound[:33] + chunk(b"pHYs", struct.pack(">IIB", *dpi, 1)) + sound[33:]
    yield "dpi_zero.tif", tiff(draw(), resolution=(0, 0))


def sizes() -> Iterator[tuple[str, bytes]]:
    for width, height in ((1, 1), (65000, 1), (1, 65000), (3, 2)):
        image = Image.fromarray(draw(height=height, width=width))
        for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF"):
            yield f"{width}x{height}.{kind.lower()}", saved(image, kind)
    yield "1x1.webp", saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)
    yield "16383x1.webp", saved(Image.new("RGB", (16383, 1)), "WEBP", lossless=True)
    yield "1x1_deep.tif", tiff(draw(np.uint16, 1, 1))


def misnamed() -> Iterator[tuple[str, bytes]]:
    files = whole_files()
    names = list(files)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        yield f"{name.partition('.')[0]}_{name.rpartition('.')[2]}.{other.rpartition('.')[2]}", files[name]
    yield "empty.png", b""
    yield "empty.tif", b""
    yield "text.jpg", b"hello " * 100
    yield "program.png", b"\x7fELF" + bytes(300)
    yield "zeros.webp", bytes(5000)
    yield "noise.bmp", b"BM" + np.random.default_rng(2).bytes(3000)
    yield "noise.tif", b"II*\0" + np.random.default_rng(3).bytes(3000)
    yield "page.svg.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/x {x} def x\n"  # must not reach Ghostscript
    yield "trailing.png", files["rgb.png"] + b"and more" * 1000
    yield "doubled.jpg", files["plain.jpg"] * 2


def truncated() -> Iterator[tuple[str, bytes]]:
    for name, data in whole_files().items():
        stem, _, kind = name.rpartition(".")
        for mark in structure(name, data):
            yield f"cut_{stem}_{mark}.{kind}", data[:mark]


def hostile_files() -> dict[str, bytes]:
    """All of them, by name."""
    makers = (truncated, bombs, odd_samples, animations, damaged_metadata, sizes, misnamed)
    return {name: data for maker in makers for name, data in maker()}
