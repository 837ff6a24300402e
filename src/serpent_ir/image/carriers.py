"""The one list of what image files carry beside their pixels, and what becomes of it in each format.

A reader puts what it finds into `Picture` (a field of that name, or an entry of `Picture.carried`). A writer writes
what its format keeps. The user is told of the rest: on reading, of what no format keeps; on writing, of what this
format does not keep.
"""

from collections.abc import Iterable
from dataclasses import dataclass

WRITTEN = (".png", ".jpg", ".webp", ".tif", ".bmp", ".avif")
"""The formats that can be written, with one suffix for each; also .jxl if its package is installed."""

KEPT, CONVERTED, TOLD = "kept", "converted", "told"


@dataclass(frozen=True)
class Carrier:
    """One thing that a file may carry.

    Attributes:
        words: what it is called in messages.
        kept: formats that hold it unchanged, by suffix.
        converted: formats that express the same in another way.
    """

    words: str
    kept: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()

    def fate(self, suffix: str) -> str:
        """What becomes of it in the format of a suffix: KEPT, CONVERTED or TOLD."""
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
    # Entries of Picture.carried, and what each one holds
    "aspect": _row("the shape of its pixels", kept=".png .jpg .tif"),  # (x, y): density without a unit
    "cicp": _row("colours by number", kept=".png .avif", converted=".jpg .webp .tif"),  # bytes of a cICP chunk
    "gamma": _row("gamma and primaries", kept=".png", converted=".jpg .webp .tif .avif"),  # chunks, into ICC
    "mastering": _row("HDR mastering data", kept=".png"),  # chunks of mDCV and cLLI
    "iptc": _row("captions as IPTC", kept=".png .jpg .tif"),  # bytes of IIM
    "comment": _row("a comment", kept=".png .jpg"),  # bytes
    "png_texts": _row("texts of PNG", kept=".png"),  # chunks
    "background": _row("a background colour (bKGD)", kept=".png"),  # content for grey or RGB, in the picture's depth
    "time": _row("a time of change (tIME)", kept=".png"),  # content
    "png_chunks": _row("chunks of other programs", kept=".png"),  # those marked safe to copy
    "extended_xmp": _row("extended XMP", kept=".jpg"),  # a packet whose GUID is in `xmp`
    "motion_video": _row("the video of a motion photo", kept=".jpg"),  # everything from the video to the file's end
    "samsung_trailer": _row("Samsung's trailer", kept=".jpg"),  # its blocks and their directory
    # Parts of Picture.tiff. At another size they are rewritten so that they hold true for that size
    "stack": _row("a description of ImageJ or OME with its scale", kept=".tif"),
    "geo": _row("its place on the map (GeoTIFF)", kept=".tif"),
    "gdal": _row("GDAL's metadata", kept=".tif"),
    "imagej": _row("ImageJ's labels, ranges and regions", kept=".tif"),
    # What no format keeps
    "gain_map": _row("a gain map (HDR)"),
    "depth_map": _row("a depth map"),
    "auxiliary": _row("auxiliary images"),
    "sound": _row("sound"),
    "further_xmp": _row("extended XMP"),  # which holds, or held, one of the above
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
    """Those of some carriers that a format cannot hold, in words, in the order of the list."""
    names = set(names)
    return [row.words for name, row in CARRIERS.items() if name in names and row.fate(suffix) == TOLD]


def kept_by_none(names: Iterable[str]) -> list[str]:
    """Those of some carriers that no format holds, in words, in the order of the list."""
    names = set(names)
    return [row.words for name, row in CARRIERS.items() if name in names and not row.kept and not row.converted]
