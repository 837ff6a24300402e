"""What image files carry beside their pixels, and what becomes of it in each format: the one list of it.

A reader puts what it finds into `Picture` (a field of that name, or an entry of `Picture.carried`). A writer writes
what its format keeps. The rest is told: at reading what no format keeps, at writing what this one does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

WRITTEN = (".png", ".jpg", ".webp", ".tif", ".bmp", ".avif")
"""The formats that are written, by one suffix each; .jxl, too, where its package is installed."""

KEPT, CONVERTED, TOLD = "kept", "converted", "told"


@dataclass(frozen=True)
class Carrier:
    """One thing that a file may carry.

    Attributes:
        words: how a person is told of it.
        kept: formats that hold it as it is, by suffix.
        converted: formats that say the same in another way.
    """

    words: str
    kept: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()

    def fate(self, suffix: str) -> str:
        """KEPT, CONVERTED or TOLD, in the format of a suffix."""
        suffix = {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)
        return KEPT if suffix in self.kept else CONVERTED if suffix in self.converted else TOLD


def _row(words: str, kept: str = "", converted: str = "") -> Carrier:
    return Carrier(words, tuple(kept.split()), tuple(converted.split()))


_ALL_BUT_BMP = ".png .jpg .webp .tif .avif"
CARRIERS: dict[str, Carrier] = {
    # Samples
    "alpha": _row("transparency", kept=".png .webp .tif .avif .jxl"),
    "deep": _row("16 bits", kept=".png .tif"),
    # Fields of Picture
    "icc_profile": _row("the ICC profile", kept=_ALL_BUT_BMP),
    "exif": _row("EXIF data", kept=f"{_ALL_BUT_BMP} .jxl"),
    "xmp": _row("XMP data", kept=f"{_ALL_BUT_BMP} .jxl"),
    "dpi": _row("the resolution", kept=".png .jpg .tif .bmp", converted=".webp .avif .jxl"),  # into the EXIF data
    # Entries of Picture.carried, with what is held there
    "aspect": _row("the shape of its pixels", kept=".png .jpg .tif"),  # (x, y): density without a unit
    "cicp": _row("colours by number", kept=".png .avif", converted=".jpg .webp .tif"),  # bytes of a cICP chunk
    "gamma": _row("gamma and primaries", kept=".png", converted=".jpg .webp .tif .avif"),  # chunks, into ICC
    "mastering": _row("HDR mastering data", kept=".png"),  # chunks of mDCV and cLLI
    "iptc": _row("captions as IPTC", kept=".png .jpg .tif"),  # bytes of IIM
    "comment": _row("a comment", kept=".png .jpg"),  # bytes
    "png_texts": _row("texts of PNG", kept=".png"),  # chunks
    "background": _row("a background colour (bKGD)", kept=".png"),  # content for grey or RGB, in the picture's depth
    "time": _row("a time of change (tIME)", kept=".png"),  # content
    "png_chunks": _row("chunks of other programs", kept=".png"),  # those that may be copied
    "extended_xmp": _row("extended XMP", kept=".jpg"),  # a packet whose GUID stands in `xmp`
    "motion_video": _row("the video of a motion photo", kept=".jpg"),  # all from the video on, to the end of the file
    "samsung_trailer": _row("Samsung's trailer", kept=".jpg"),  # its blocks and their directory
    # Parts of Picture.tiff: at another size they are written as they are true of that
    "stack": _row("a description of ImageJ or OME with its scale", kept=".tif"),
    "geo": _row("its place on the map (GeoTIFF)", kept=".tif"),
    "gdal": _row("GDAL's metadata", kept=".tif"),
    "imagej": _row("ImageJ's labels, ranges and regions", kept=".tif"),
    # What no format keeps
    "gain_map": _row("a gain map (HDR)"),
    "depth_map": _row("a depth map"),
    "auxiliary": _row("auxiliary images"),
    "sound": _row("sound"),
    "further_xmp": _row("extended XMP"),  # which holds, or held, one of those
    "further_images": _row("further images (MPF)"),
    "lost_video": _row("a motion video"),
    "trailer": _row("data after its end"),
    "photoshop": _row("Photoshop's data (paths, layers, ...)"),
    "content_credentials": _row("content credentials (C2PA)"),
    "thermal": _row("thermal data (FLIR)"),
    "app_segments": _row("data of other programs"),
    "significant_bits": _row("the count of significant bits (sBIT)"),
    "regions": _row("regions of faces in XMP"),
}


def fate(name: str, suffix: str) -> str:
    """What becomes of a carrier in the format of a suffix: KEPT, CONVERTED or TOLD."""
    return CARRIERS[name].fate(suffix)


def not_kept(names: Iterable[str], suffix: str) -> list[str]:
    """Of some carriers those that a format cannot hold, in words and in the order of the list."""
    names = set(names)
    return [row.words for name, row in CARRIERS.items() if name in names and row.fate(suffix) == TOLD]


def kept_by_none(names: Iterable[str]) -> list[str]:
    """Of some carriers those that no format holds, in words and in the order of the list."""
    names = set(names)
    return [row.words for name, row in CARRIERS.items() if name in names and not row.kept and not row.converted]
