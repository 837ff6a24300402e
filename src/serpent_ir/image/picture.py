"""`Picture`: what an image file holds. Decoders make it, networks change it, and encoders write it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B")

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class TiffRecord:
    """What a TIFF says about its pixels' size and place. For another size it is rewritten so that it holds true.

    Attributes:
        size: size (width, height) of the image for which it is true.
        descriptions: texts of ImageDescription, as bytes.
        resolution: XResolution and YResolution as fractions, and ResolutionUnit: 1 none, 2 inch, 3 cm.
        tags: GeoTIFF's and GDAL's: number, type in `struct`'s notation, count, value.
        imagej: content of ImageJ's own tag: Labels, Ranges, LUTs, Info, ROI, Overlays, Properties.
    """

    size: tuple[int, int]
    descriptions: tuple[bytes, ...] = ()
    resolution: tuple[tuple[int, int], tuple[int, int], int] | None = None
    tags: tuple[tuple[int, str, int, Any], ...] = ()
    imagej: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what must survive its restoration. `dataclasses.replace(picture, pixels=...)` swaps the pixels.

    Attributes:
        pixels: (H, W, 3) uint8 or uint16, RGB, upright: the EXIF orientation is applied and removed.
        alpha: (H, W) of the same dtype, not premultiplied; None if the image is opaque.
        mode: Pillow's name for the colours in the file ("L", "P", "RGB", "CMYK", ...), or, for 16 bits, "I;16", "LA",
            "RGB" or "RGBA". Grey modes are written back as grey.
        format: Pillow's name of the file format ("PNG", "JPEG", ...).
        icc_profile: the ICC profile of the pixels; None if there is none, or if it was for CMYK or another space that
            was converted.
        exif: EXIF data in the form in which Pillow saves it.
        xmp: the XMP packet.
        dpi: horizontal and vertical resolution in pixels per inch.
        carried: everything else that the file carried and some format keeps, by its name in `image_carriers.CARRIERS`.
        tiff: what only a TIFF can hold.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    mode: str = "RGB"
    format: str | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    tiff: TiffRecord | None = None

    @property
    def is_grey(self) -> bool:
        """Whether the file had no colour."""
        return self.mode in GREY_MODES


Span = tuple[int, int]
