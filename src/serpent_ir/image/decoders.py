"""Makes pictures of the bytes of image files. `image/files.py` uses it.

The depth comes from the file's header, never from the pixels. Pillow decodes, but it holds colour in 8 bits. So 16-bit
PNG goes through OpenCV and 16-bit TIFF through tifffile. HEIC goes through pillow-heif if that is installed.
"""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from serpent_ir.errors import ImageError
from serpent_ir.image import jxl as image_jxl
from serpent_ir.image.decoding import MAX_PIXELS as MAX_PIXELS
from serpent_ir.image.decoding import check_size, with_opencv
from serpent_ir.image.metadata import metadata_of
from serpent_ir.image.picture import Picture, TiffRecord
from serpent_ir.image.pillow import colours_and_alpha
from serpent_ir.image.png import alpha_of_png
from serpent_ir.image.tiff_records import read_record
from serpent_ir.image.tiff_samples import read_samples
from serpent_ir.system.forks import Lock, in_child

_PNG, TIFFS = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Formats that Pillow knows well. If it finds no image in one, the file is damaged, and OpenCV would return a part of
# it.
_PILLOW_SIGNATURES = (_PNG, *TIFFS, b"\xff\xd8", b"RIFF", b"BM", b"GIF8")
_PPM_HEADER = re.compile(rb"P[36](?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+(\d{1,5})\s")
_HEIFS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands; AVIF also uses the last two
_bound_lock = Lock()
_bounds: list[int | None] = []  # Pillow's own bound, while it is replaced


def decode(data: bytes, planes: int = 1, *, whole: bool = False) -> tuple[Picture, list[str], list[str]]:
    """The picture in a file, and notes for the user on how its pixels, and its metadata, were read.

    `data` may be a page of a TIFF of `planes` pages; `whole` says that all of them will stay together.

    Raises ImageError for known problems, and whatever a decoder raises for a damaged file.
    """
    notes, lost = [], []
    image = open_header(data)
    tiff = data.startswith(TIFFS)
    kept, orientation = {}, 1
    if image is not None:
        check_size(*image.size)
        if image.format == "EPS":  # Pillow would run it with Ghostscript, which may take any time
            raise ImageError("is PostScript, a program that draws; export it as PNG")
        # The further images of a JPEG are reported with the rest of what follows its image.
        if image.format not in ("JPEG", "MPO") and (frames := getattr(open_header(data), "n_frames", 1)) > 1:
            notes.append(f"holds {frames} images; the first is taken")
    if tiff:
        # Metadata comes first: when Pillow loads the pixels of a TIFF, it turns them upright.
        kept, orientation = metadata_of(image, io.BytesIO(data), notes, lost)
        kept["tiff"] = tiff_record(io.BytesIO(data), orientation, lost, planes, whole=whole)
        if read := read_samples(data, image, notes):
            picture = _picture(read[0], mode=read[1], format="TIFF")
            return _upright(replace(picture, **kept), orientation), notes, lost
        orientation = 1
    if image is None:
        return _decode_other(data), notes, lost
    image.load()  # raises if data is missing, so nothing below this line needs to check for that
    if not tiff:
        kept, orientation = metadata_of(image, io.BytesIO(data), notes, lost)
    grey16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # a PGM is scaled to 16 bits
    deep = None
    if (bits := _bits(data, image)) > 8:
        deep = _decode_deep(data, image, bits)
        if deep is None:
            notes.append(f"has {bits} bits; 8 of them are kept")
    if deep is not None:
        picture = deep
    elif data.startswith(_PNG) and data[24] == 16:  # IHDR's bit depth
        picture = _decode_png16(data, image)
    elif grey16:
        picture = _picture(np.asarray(image).astype(np.uint16), mode="I;16", format=image.format)
    elif image.mode in ("I", "F"):
        raise ImageError(f"has {image.mode!r} samples; integers of at most 16 bits are supported, convert it first")
    else:
        mode = image.mode
        if mode == "LAB":
            notes.append("is CIELAB; converted to sRGB")
        if mode == "CMYK":
            image, kept["icc_profile"] = _from_cmyk(image, notes)
        transparent = image.has_transparency_data
        if image.mode != ("RGBA" if transparent else "RGB"):
            image = _converted(image, "RGBA" if transparent else "RGB")
        picture = Picture(*colours_and_alpha(image), mode=mode, format=image.format)
        if data.startswith(_PNG) and (alpha := alpha_of_png(data, picture.pixels)) is not None:
            picture = replace(picture, alpha=alpha)
    return _upright(replace(picture, **kept), orientation), notes, lost


def tiff_record(
    file: BinaryIO, orientation: int, lost: list[str], planes: int = 1, *, whole: bool = False
) -> TiffRecord | None:
    """`Picture.tiff` of the first page of a TIFF. `lost` receives what is left out. Damaged tags give nothing."""
    import tifffile

    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first.aspage()
            width, height = page.imagewidth, page.imagelength
            turned = orientation in range(2, 9)
            upright = (height, width) if orientation in range(5, 9) else (width, height)
            record, left = read_record(page, planes, whole=whole, turned=turned, size=upright)
    except MemoryError:
        raise
    except Exception:  # tifffile raises all kinds of exceptions for damaged tags
        return None
    lost += left
    return record


def open_header(data: bytes | BinaryIO) -> Image.Image | None:
    """Parse the header with Pillow; None if Pillow does not know the format."""
    start = data[:4] if isinstance(data, bytes) else data.read(4)
    if start == b"MM\0+":  # Pillow mistakes it for a TIFF with 32-bit offsets
        return None
    with _bound_lock:  # Pillow's bound is a global of its module; the caller checks ours
        _bounds.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        file.seek(0)
        try:
            return Image.open(file)
        except UnidentifiedImageError:
            return _open_heif(file) or _open_jxl(file)
        finally:
            Image.MAX_IMAGE_PIXELS = _bounds.pop()


@in_child
def _put_bound_back() -> None:
    if _bounds:
        Image.MAX_IMAGE_PIXELS = _bounds.pop()


def _open_jxl(file: BinaryIO) -> Image.Image | None:
    file.seek(0)
    if not image_jxl.INSTALLED or not image_jxl.is_jxl(file.read(12)):
        return None
    image_jxl.register()
    file.seek(0)
    return Image.open(file)


def _open_heif(file: BinaryIO) -> Image.Image | None:
    """A HEIC photo, opened as Pillow would open it; None for anything else, and if pillow-heif is missing."""
    file.seek(0)
    if not _is_heif(file.read(12)):
        return None
    try:
        from pillow_heif import HeifImageFile
    except ModuleNotFoundError:
        return None
    file.seek(0)
    return HeifImageFile(file)  # not registered with Pillow: that would affect the whole process, which is not ours


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in _HEIFS


def _from_cmyk(image: Image.Image, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """CMYK as RGB, and the profile of that RGB: by the file's own profile, or by Pillow's formula if it has none."""
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


def _converted(image: Image.Image, mode: str) -> Image.Image:
    converted = image.convert(mode)
    converted.format = image.format
    return converted


def _picture(array: NDArray[Any], *, mode: str, format: str | None) -> Picture:
    """Split decoded samples, (H, W) or (H, W, 1 to 4), in the order grey or RGB, then alpha."""
    array = array[..., None] if array.ndim == 2 else array
    colours = array.shape[2] - (array.shape[2] in (2, 4))
    pixels = np.ascontiguousarray(np.broadcast_to(array[..., :colours], (*array.shape[:2], 3)))
    alpha = np.ascontiguousarray(array[..., colours]) if colours < array.shape[2] else None
    return Picture(pixels, alpha, mode=mode, format=format)


def _decode_deep(data: bytes, image: Image.Image, bits: int) -> Picture | None:
    """The 10 or 12 bits of an AVIF or HEIC as 16 bits; None if nothing that is installed reads them."""
    array = None
    if image.format == "AVIF":
        try:
            array = with_opencv(data)
        except ImageError:
            return None  # this OpenCV has no AVIF
    elif image.format == "HEIF":
        from pillow_heif import open_heif

        heif = open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
        heif = heif[heif.primary_index]
        if heif.mode in ("RGB;16", "RGBA;16", "I;16"):
            array = np.asarray(heif) >> (16 - bits)
    if array is None or array.dtype != np.uint16 or array.shape[:2] != image.size[::-1]:
        return None
    most = 2**bits - 1
    array = (np.minimum(array, most).astype(np.uint32) * 65535 + most // 2) // most
    return _picture(array.astype(np.uint16), mode=image.mode, format=image.format)


def _decode_png16(data: bytes, image: Image.Image) -> Picture:
    # Check checksums and the end of the file, since OpenCV would only warn on stderr and continue.
    cast(Image.Image, open_header(data)).verify()
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("is cut short; get the file again")
    array = with_opencv(data)
    grey, has_alpha = data[25] in (0, 4), data[25] in (4, 6)  # IHDR's colour type
    if grey and array.ndim == 3:
        array = array[..., [0, 3]]
    elif (alpha := alpha_of_png(data, array[..., :3] if array.ndim == 3 else array)) is not None:
        array = np.dstack([array[..., :3] if array.ndim == 3 else array, alpha])
        has_alpha = True
    return _picture(array, mode=("LA" if has_alpha else "I;16") if grey else image.mode, format="PNG")


def _decode_other(data: bytes) -> Picture:
    """A file that Pillow does not know. OpenCV reads a few more formats."""
    if _is_heif(data[:12]):
        raise ImageError("is HEIC, which takes another package: pip install 'serpent-ir[heic]'; or export it as JPEG")
    if image_jxl.is_jxl(data) and not image_jxl.INSTALLED:
        raise ImageError("is JPEG XL, which takes another package: pip install 'serpent-ir[jxl]'; or export it as PNG")
    if data.startswith(_PILLOW_SIGNATURES):
        raise ImageError("is damaged, cut short, or of a kind that Pillow does not read; get it again or convert it")
    array = with_opencv(data)
    check_size(array.shape[1], array.shape[0])
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"has {array.dtype} samples; integers of at most 16 bits are supported, convert it first")
    return _picture(array, mode="L" if array.ndim == 2 else "RGB", format=None)


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits per sample in the file, for formats of which Pillow gives only 8."""
    if image.mode.startswith("I"):
        return 8  # Pillow gives these as 16 bits already
    if image.format == "PPM" and (numbers := _PPM_HEADER.match(data)):
        return max(8, int(numbers[1]).bit_length())
    if image.format == "JPEG2000" and (start := data.find(b"\xff\x4f\xff\x51")) >= 0:
        return max(8, (data[start + 42] & 0x7F) + 1)  # of the first component, in the SIZ marker
    if image.format == "JXL":
        return image_jxl.bits_of(data)
    if image.format != "AVIF":
        return image.info.get("bit_depth", 8)  # HEIC
    flags = data[data.find(b"av1C") + 6]  # AV1's configuration: tier, high_bitdepth, twelve_bit, ...
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = _TURNS.get(orientation)
    if turn is None:
        return picture
    alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return replace(picture, pixels=np.ascontiguousarray(turn(picture.pixels)), alpha=alpha)


_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # EXIF orientation -> what turns (H, W, ...) upright
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: np.rot90,
}


def reason(error: Exception) -> str:
    """An exception's message as one line."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0]
