"""Bytes of image files -> pictures. Used by `image.py`.

The depth comes from the file's header, never from the pixels. Pillow decodes, but it holds colour in 8 bits: 16-bit PNG
goes through OpenCV and 16-bit TIFF through tifffile, HEIC through pillow-heif where that is installed.
"""

import io
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from serpent_ir.errors import ImageError
from serpent_ir.forks import Lock, in_child
from serpent_ir.image_metadata import metadata_of, png_texts
from serpent_ir.memory import host_available
from serpent_ir.picture import Picture

MAX_PIXELS = 2**30
"""Largest image read, in pixels: 32768 x 32768. Above Pillow's own bound, since large images are a use of this package;
the bound that is left keeps a small hostile file from filling the memory."""

_PNG, TIFFS = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What Pillow knows well: if it finds no image there the file is damaged, and OpenCV would return a part of it.
_PILLOW_SIGNATURES = (_PNG, *TIFFS, b"\xff\xd8", b"RIFF", b"BM", b"GIF8")
_PPM_HEADER = re.compile(rb"P[36](?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+(\d{1,5})\s")
_HEIFS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands; AVIF, too, has the last two
_DECODING = 12  # bytes for each pixel and byte of depth, about: the decoder's copy, the conversion to RGB, and ours
_bound_lock = Lock()
_bounds: list[int | None] = []  # Pillow's own, while there is none in its place


def decode(data: bytes) -> tuple[Picture, list[str], list[str]]:
    """The picture in a file, and what a person should know of how its pixels, and its metadata, were read.

    Raises ImageError for what is known to be wrong, and whatever a decoder raises for a damaged file.
    """
    notes, lost = [], []
    image = open_header(data)
    tiff = data.startswith(TIFFS)
    kept, orientation = {}, 1
    if image is not None:
        check_size(*image.size)
        if (frames := getattr(open_header(data), "n_frames", 1)) > 1:
            notes.append(f"holds {frames} images; the first is taken")
        if (bits := _bits(data, image)) > 8:
            notes.append(f"has {bits} bits; 8 of them are kept")
    if tiff:
        # First: when Pillow loads the pixels of a TIFF it turns them upright.
        kept, orientation = metadata_of(image, io.BytesIO(data), notes, lost)
        if picture := _decode_tiff(data, image, notes):
            return _upright(replace(picture, **kept), orientation), notes, lost
        orientation = 1
    if image is None:
        return _decode_other(data), notes, lost
    image.load()  # raises where data is missing; nothing below this line needs to look for that
    if not tiff:
        kept, orientation = metadata_of(image, io.BytesIO(data), notes, lost)
    grey16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # a PGM is scaled to 16 bits
    if data.startswith(_PNG):
        kept["png_texts"] = png_texts(data)
    if data.startswith(_PNG) and data[24] == 16:  # IHDR's bit depth
        picture = _decode_png16(data, image)
    elif grey16:
        picture = _picture(np.asarray(image).astype(np.uint16), mode="I;16", format=image.format)
    elif image.mode in ("I", "F"):
        raise ImageError(f"has {image.mode!r} samples; integers of at most 16 bits are supported, convert it first")
    else:
        mode = image.mode
        if mode == "CMYK":
            image, kept["icc_profile"] = _from_cmyk(image, notes)
        array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        picture = _picture(array, mode=mode, format=image.format)
    return _upright(replace(picture, **kept), orientation), notes, lost


def open_header(data: bytes | BinaryIO) -> Image.Image | None:
    """Parse the header with Pillow; None if it knows no such format."""
    with _bound_lock:  # Pillow's bound is a global of its module; ours is checked by the caller
        _bounds.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        try:
            return Image.open(file)
        except UnidentifiedImageError:
            return _open_heif(file)
        finally:
            Image.MAX_IMAGE_PIXELS = _bounds.pop()


@in_child
def _put_bound_back() -> None:
    if _bounds:
        Image.MAX_IMAGE_PIXELS = _bounds.pop()


def _open_heif(file: BinaryIO) -> Image.Image | None:
    """A HEIC photo as Pillow would open it; None for anything else, and where pillow-heif is missing."""
    file.seek(0)
    if not _is_heif(file.read(12)):
        return None
    try:
        from pillow_heif import HeifImageFile
    except ModuleNotFoundError:
        return None
    file.seek(0)
    return HeifImageFile(file)  # not registered with Pillow: that is for the whole process, and its owner's to decide


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in _HEIFS


def check_size(width: int, height: int, depth: int = 1) -> None:
    """Raise ImageError for an image beyond the bound, or that cannot be decoded in the memory there is."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"is {width}x{height} px, over the bound of {MAX_PIXELS} pixels; cut it into parts first")
    need = width * height * depth * _DECODING
    if need > 1 << 28 and need > (free := host_available()):
        raise ImageError(
            f"is {width}x{height} px: opening it takes about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "cut it into parts first"
        )


def _from_cmyk(image: Image.Image, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """CMYK as RGB and the profile of that: by the file's own profile, or by Pillow's formula where it has none."""
    own = image.info.get("icc_profile")
    if own:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        try:
            rgb = ImageCms.profileToProfile(image, io.BytesIO(own), srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            rgb = None
        if rgb is not None:
            notes.append("is CMYK; converted to sRGB by its colour profile")
            rgb.format = image.format
            return rgb, srgb.tobytes()
    notes.append("is CMYK without a usable colour profile; converted to RGB by a formula, colours may differ")
    return image, None


def _picture(array: NDArray[Any], *, mode: str, format: str | None) -> Picture:
    """Split decoded samples, (H, W) or (H, W, 1 to 4) in the order grey or RGB, then alpha."""
    array = array[..., None] if array.ndim == 2 else array
    colours = array.shape[2] - (array.shape[2] in (2, 4))
    pixels = np.ascontiguousarray(np.broadcast_to(array[..., :colours], (*array.shape[:2], 3)))
    alpha = np.ascontiguousarray(array[..., colours]) if colours < array.shape[2] else None
    return Picture(pixels, alpha, mode=mode, format=format)


def _with_opencv(data: bytes) -> NDArray[Any]:
    """Decode to RGB order. OpenCV returns the part it could read of a damaged file: check before with Pillow."""
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what matters is raised below
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if array is None:
        raise ImageError("is not an image that Pillow or OpenCV reads")
    if array.ndim == 3 and array.shape[2] >= 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    return array


def _decode_png16(data: bytes, image: Image.Image) -> Picture:
    # Checksums and end of file, where OpenCV would warn on stderr and go on.
    cast(Image.Image, open_header(data)).verify()
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("is cut short; get the file again")
    array = _with_opencv(data)
    grey, has_alpha = data[25] in (0, 4), data[25] in (4, 6)  # IHDR's colour type
    if grey and array.ndim == 3:
        array = array[..., [0, 3]]
    elif grey and "transparency" in image.info:  # OpenCV drops the transparent level of a grey PNG
        array = np.stack([array, np.where(array == image.info["transparency"], 0, 65535).astype(np.uint16)], -1)
        has_alpha = True
    return _picture(array, mode=("LA" if has_alpha else "I;16") if grey else image.mode, format="PNG")


def _decode_other(data: bytes) -> Picture:
    """A file that Pillow does not know; OpenCV reads a few more formats."""
    if _is_heif(data[:12]):
        raise ImageError("is HEIC, which takes another package: pip install 'serpent-ir[heic]'; or export it as JPEG")
    if data.startswith(_PILLOW_SIGNATURES):
        raise ImageError("is damaged, cut short, or of a kind that Pillow does not read; get it again or convert it")
    array = _with_opencv(data)
    check_size(array.shape[1], array.shape[0])
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"has {array.dtype} samples; integers of at most 16 bits are supported, convert it first")
    return _picture(array, mode="L" if array.ndim == 2 else "RGB", format=None)


def _bits(data: bytes, image: Image.Image) -> int:
    """Of a sample in the file, for formats where Pillow gives 8 of however many."""
    if image.mode.startswith("I"):
        return 8  # which Pillow gives as 16
    if image.format == "PPM" and (numbers := _PPM_HEADER.match(data)):
        return max(8, int(numbers[1]).bit_length())
    if image.format == "JPEG2000" and (start := data.find(b"\xff\x4f\xff\x51")) >= 0:
        return max(8, (data[start + 42] & 0x7F) + 1)  # of the first component, in SIZ
    if image.format != "AVIF":
        return image.info.get("bit_depth", 8)  # HEIC
    flags = data[data.find(b"av1C") + 6]  # AV1's configuration: tier, high_bitdepth, twelve_bit, ...
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _decode_tiff(data: bytes, image: Image.Image | None, notes: list[str]) -> Picture | None:
    """The first page of a TIFF whose samples Pillow would cut to 8 bits; None if Pillow keeps them."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would print arrives as an ImageError
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first.aspage()
        samples, extra = page.samplesperpixel, page.extrasamples
        has_alpha = bool(extra) and extra[0] in (1, 2)  # 0: a mask of an editor, or whatever
        if (more := len(extra) - has_alpha) and page.photometric in (0, 1, 2):
            notes.append(f"has {more} channel{'s' * (more > 1)} beside its colours; left out")
        if page.bitspersample <= 8:
            return None
        if page.dtype != np.uint16 or page.photometric not in (0, 1, 2) or page.axes not in ("YX", "YXS", "SYX"):
            kind = f"{page.dtype} samples, {tifffile.PHOTOMETRIC(page.photometric).name}"
            raise ImageError(f"has {kind}; supported are 8- and 16-bit integers, RGB or grey: convert it first")
        check_size(page.imagewidth, page.imagelength, depth=2)
        ends = (start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > len(data) or not all(page.databytecounts):
            raise ImageError("is cut short; get the file again")  # tifffile would fill in zeros
        try:
            array = page.asarray()
        except (ImportError, ValueError) as error:
            if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
                raise
            array = _decode_lzw(data, image, page)
        else:
            array = array.transpose(1, 2, 0) if page.axes == "SYX" else array
        if page.photometric == 0:  # 0 is white
            array = np.concatenate([65535 - array[..., :1], array[..., 1:]], -1) if array.ndim == 3 else 65535 - array
        keep = samples - len(extra) + has_alpha
        if array.ndim == 3:
            array = array[..., :keep]
        mode = {1: "I;16", 2: "LA", 3: "RGB", 4: "RGBA"}[keep]
        picture = _picture(array, mode=mode, format="TIFF")
        if has_alpha and extra[0] == 1 and picture.alpha is not None:  # premultiplied
            whole = np.maximum(picture.alpha, 1)[..., None]
            pixels = np.rint(np.minimum(picture.pixels / whole, 1) * 65535).astype(np.uint16)
            picture = replace(picture, pixels=pixels)
        return picture


def _decode_lzw(data: bytes, image: Image.Image | None, page: Any) -> NDArray[Any]:
    """The samples (H, W) or (H, W, S) of a page that tifffile would read with another package alone."""
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    array = None
    if image is not None and page.compression.name == "LZW" and page.planarconfig == 1:
        image.load()
        if tag := page.tags.get(274):  # OpenCV would turn the image upright, and we once more
            upright = bytearray(data)
            order = "little" if data.startswith(b"II") else "big"
            upright[tag.valueoffset : tag.valueoffset + 2] = (1).to_bytes(2, order)
            data = bytes(upright)
        array = _with_opencv(data)
    if array is None or array.shape != shape[: array.ndim] or array.size != np.prod(shape):
        raise ImageError(
            f"its samples of {page.bitspersample} bits are compressed ({page.compression.name}) in a way that is not "
            "read; save it as Deflate or uncompressed"
        )
    return array


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = _TURNS.get(orientation)
    if turn is None:
        return picture
    alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return replace(picture, pixels=np.ascontiguousarray(turn(picture.pixels)), alpha=alpha)


_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # EXIF orientation -> what makes (H, W, ...) upright
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: np.rot90,
}


def reason(error: Exception) -> str:
    """One line of what an exception says."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0]
