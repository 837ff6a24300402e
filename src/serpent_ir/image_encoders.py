"""Pictures -> bytes of image files: what Pillow writes, and the 16 bits and EXIF that it cannot. Used by `image.py`."""

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

if TYPE_CHECKING:
    from serpent_ir.image import Picture

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},  # exact: keeps the colour of transparent pixels
    ".tif": {},  # not by Pillow
    ".tiff": {},
    ".bmp": {"format": "BMP"},
}
_DEEP, _OPAQUE = (".png", ".tif", ".tiff"), (".jpg", ".jpeg", ".bmp")
SUB_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


def encode(picture: "Picture", suffix: str) -> bytes:
    """The bytes of an image file in the format of a suffix of `SAVE_OPTIONS`."""
    pixels, alpha = picture.pixels, picture.alpha
    if pixels.dtype == np.uint16 and suffix not in _DEEP:
        pixels, alpha = (None if x is None else np.rint(x / 257).astype(np.uint8) for x in (pixels, alpha))
        assert pixels is not None
    if picture.is_grey:
        pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(pixels.dtype)
    array = pixels if alpha is None or suffix in _OPAQUE else np.dstack([pixels, alpha])
    if suffix in (".tif", ".tiff"):
        return _encode_tiff(picture, array)
    if array.dtype == np.uint16:
        return _encode_png16(picture, array)
    options = dict(SAVE_OPTIONS[suffix], icc_profile=picture.icc_profile, exif=picture.exif, dpi=picture.dpi)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, **{name: value for name, value in options.items() if value is not None})
    return buffer.getvalue()


def left_out(picture: "Picture", suffix: str) -> list[str]:
    """What of a picture the format cannot hold, in words."""
    lost = []
    if suffix in _OPAQUE and picture.alpha is not None and picture.alpha.min() < np.iinfo(picture.alpha.dtype).max:
        lost.append("transparency")
    if suffix == ".bmp":
        lost += ["the ICC profile"] * bool(picture.icc_profile) + ["EXIF data"] * bool(picture.exif)
    return lost


def _encode_png16(picture: "Picture", array: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 2 to 4): OpenCV writes the pixels, the metadata is put in after the header."""
    import cv2

    order = {2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}  # OpenCV knows no grey with alpha
    data = cv2.imencode(".png", array if array.ndim == 2 else array[..., order[array.shape[2]]])[1].tobytes()
    chunks = []
    if picture.icc_profile:
        chunks.append(b"iCCPICC Profile\0\0" + zlib.compress(picture.icc_profile))
    if picture.dpi:
        chunks.append(b"pHYs" + struct.pack(">IIB", *(round(value / 0.0254) for value in picture.dpi), 1))
    if picture.exif:
        chunks.append(b"eXIf" + picture.exif.removeprefix(b"Exif\0\0"))
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    end_of_header = 33  # signature and IHDR
    return b"".join([data[:end_of_header], *framed, data[end_of_header:]])


def _encode_tiff(picture: "Picture", array: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 2 to 4), 8 or 16 bits, deflated.

    By tifffile at either depth: Pillow has no 16-bit colour, and cannot write EXIF data into a compressed TIFF.
    """
    import tifffile
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = Image.Exif()
    if array.nbytes < 2**31:  # beyond 4 GB tifffile writes BigTIFF, whose directories are others
        tags.load(picture.exif or b"")
    sub_ifds = {tag: ifd for tag in SUB_IFDS if (ifd := dict(tags.get_ifd(tag)))}
    extra = [(tag, "s", 0, value, True) for tag, value in tags.items() if isinstance(value, str)]
    extra += [(tag - 1, "I", 1, 0, True) for tag in sub_ifds]  # a free number: tifffile refuses the real one
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": "zlib", "predictor": True, "byteorder": "<", "metadata": None}
    options |= {"photometric": "minisblack" if picture.is_grey else "rgb", "software": False, "extratags": extra}
    if array.ndim == 3:
        options |= {"planarconfig": "contig", "extrasamples": ["unassalpha"] * (array.shape[2] in (2, 4))}
    if picture.dpi:
        options |= {"resolution": picture.dpi, "resolutionunit": "INCH"}
    tifffile.imwrite(buffer, array, iccprofile=picture.icc_profile, **options)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        entries = {tag: file.pages.first.aspage().tags[tag - 1].offset for tag in sub_ifds}
    for tag, entry in entries.items():  # append each directory and point there
        data += b"\0" * (len(data) % 2)
        struct.pack_into("<HHII", data, entry, tag, 4, 1, len(data))
        directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=tag)
        directory.update(sub_ifds[tag])
        data += directory.tobytes(len(data))
    return bytes(data)
