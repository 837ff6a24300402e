"""Samples of a TIFF's first page that Pillow would cut to 8 bits, misread or refuse. For `image/decoders.py`."""

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serpent_ir.errors import ImageError
from serpent_ir.image.decoding import check_size, with_opencv

_YCBCR, _JPEGS = 6, (6, 7)


def read_samples(data: bytes, image: Image.Image | None, notes: list[str]) -> tuple[NDArray[Any], str] | None:
    """Samples (H, W) or (H, W, 2 to 4), grey or RGB, then alpha (not premultiplied), and Pillow's name for that mode.

    None if Pillow, which opened `image`, reads them correctly. `notes` receives what changes how they are seen.

    Raises:
        ImageError: no pixels, samples that are not unsigned integers of at most 16 bits, or a colour space or
            compression that is not supported, which is named.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would print also arrives as an ImageError
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first.aspage()
        check_size(page.imagewidth, page.imagelength, depth=2 if page.bitspersample > 8 else 1)
        samples, extra = page.samplesperpixel, page.extrasamples
        has_alpha = bool(extra) and extra[0] in (1, 2)  # 0: an editor's mask, or anything else
        if (more := len(extra) - has_alpha) and page.photometric in (0, 1, 2):
            notes.append(f"has {more} channel{'s' * (more > 1)} beside its colours; left out")
        if page.dtype is None or page.dtype.kind not in "bu":
            raise _refusal(page)
        luma = page.photometric == _YCBCR and page.compression not in _JPEGS  # Pillow does not read this
        if page.bitspersample <= 8 and image is not None and not luma:
            return None
        usual = page.photometric in (0, 1, 2) or (luma and page.bitspersample == 8 and page.subsampling == (1, 1))
        usual = usual and page.axes in ("YX", "YXS", "SYX") and page.imagedepth == 1
        if not usual or page.dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16):
            raise _refusal(page)
        ends = (start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > len(data) or not all(page.databytecounts):
            raise ImageError("is cut short; get the file again")  # tifffile would fill in zeros
        try:
            array = page.asarray()
        except (ImportError, ValueError) as error:
            if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
                raise
            array = _with_lzw(data, image, page)
        else:
            array = array.transpose(1, 2, 0) if page.axes == "SYX" else array
        full = np.iinfo(array.dtype).max
        if page.photometric == 0:  # 0 is white
            array = np.concatenate([full - array[..., :1], array[..., 1:]], -1) if array.ndim == 3 else full - array
        keep = samples - len(extra) + has_alpha
        array = array[..., :keep] if array.ndim == 3 else array
        if luma:
            array = np.array(Image.fromarray(np.ascontiguousarray(array[..., :3]), "YCbCr").convert("RGB"))
            keep = 3
        if has_alpha and extra[0] == 1:  # premultiplied
            colours = np.rint(np.minimum(array[..., :-1] / np.maximum(array[..., -1:], 1), 1) * full)
            array = np.concatenate([colours.astype(array.dtype), array[..., -1:]], -1)
        return array, {1: "I;16" if full > 255 else "L", 2: "LA", 3: "RGB", 4: "RGBA"}[keep]


def _refusal(page: Any) -> ImageError:
    import tifffile

    colours = tifffile.PHOTOMETRIC(page.photometric).name
    samples = f"samples of {page.bitspersample} bits"
    if page.dtype is not None and page.dtype.itemsize * 8 == page.bitspersample:
        samples = f"{page.dtype} samples"
    return ImageError(
        f"has {samples}, {colours}; supported are unsigned 8- and 16-bit integers, RGB or grey: convert it first"
    )


def _with_lzw(data: bytes, image: Image.Image | None, page: Any) -> NDArray[Any]:
    """The samples (H, W) or (H, W, S) of a page for which tifffile would need another package."""
    shape = (page.imagelength, page.imagewidth, page.samplesperpixel)
    array = None
    if image is not None and page.compression.name == "LZW" and page.planarconfig == 1:
        image.load()
        if tag := page.tags.get(274):  # OpenCV would turn the image upright, and we would do so once more
            upright = bytearray(data)
            order = "little" if data.startswith(b"II") else "big"
            upright[tag.valueoffset : tag.valueoffset + 2] = (1).to_bytes(2, order)
            data = bytes(upright)
        array = with_opencv(data)
    if array is None or array.shape != shape[: array.ndim] or array.size != np.prod(shape):
        raise ImageError(
            f"its samples of {page.bitspersample} bits are compressed ({page.compression.name}) in a way that is not "
            "read; save it as Deflate or uncompressed"
        )
    return array
