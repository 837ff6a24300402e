"""What an image file holds: `Picture`, which the decoders make, the networks change and the encoders write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B")

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class TiffRecord:
    """What a TIFF says of its pixels' size and place; at another size it is written as it is true of that.

    Attributes:
        size: of the image that it is true of, width first.
        descriptions: texts of ImageDescription, as bytes.
        resolution: XResolution and YResolution as fractions, and ResolutionUnit: 1 none, 2 inch, 3 cm.
        tags: of GeoTIFF and GDAL: number, type as `struct` has it, count, value.
        imagej: what stands in ImageJ's own tag: Labels, Ranges, LUTs, Info, ROI, Overlays, Properties.
    """

    size: tuple[int, int]
    descriptions: tuple[bytes, ...] = ()
    resolution: tuple[tuple[int, int], tuple[int, int], int] | None = None
    tags: tuple[tuple[int, str, int, Any], ...] = ()
    imagej: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what must survive its restoration; `dataclasses.replace(picture, pixels=...)` swaps the pixels.

    Attributes:
        pixels: (H, W, 3) uint8 or uint16, RGB, upright: the EXIF orientation is applied, and taken out.
        alpha: (H, W) of the same dtype, not premultiplied; None where the image is opaque.
        mode: Pillow's name of the colours in the file ("L", "P", "RGB", "CMYK", ...) or, for 16 bits, "I;16", "LA",
            "RGB" or "RGBA". Grey modes are written back as grey.
        format: Pillow's name of the file format ("PNG", "JPEG", ...).
        icc_profile: the ICC profile of the pixels; None if there is none, or if it was for CMYK or another space left.
        exif: EXIF data as Pillow saves it.
        xmp: the XMP packet.
        dpi: horizontal and vertical resolution in pixels per inch.
        carried: what else the file carried and some format keeps, by its name in `image_carriers.CARRIERS`.
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
