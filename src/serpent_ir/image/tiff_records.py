"""What only a TIFF can say about its pixels' size and place: descriptions of stacks, scale, GeoTIFF.

Sources: the GeoTIFF standard (OGC 19-008r4), GDAL's TIFF driver, ImageJ's TiffDecoder.
"""

from typing import Any, cast

from serpent_ir.image.picture import TiffRecord
from serpent_ir.image.tiff_descriptions import as_written, files_of_ome, gone, kind_of, of_first_plane

_DESCRIPTION, _X, _Y, _UNIT = 270, 282, 283, 296
_PIXEL_SCALE, _TIEPOINTS, _MATRIX, _GEO_KEYS, _RPC = 33550, 33922, 34264, 34735, 50844
_GEO = {_PIXEL_SCALE: "d", _TIEPOINTS: "d", _MATRIX: "d", _GEO_KEYS: "H", 34736: "d", 34737: "s", _RPC: "d"}
_GDAL = {42112: "s", 42113: "s"}  # metadata as XML; the value of pixels without data
_IJ_METADATA = 50839
_OF_ALL = {"Overlays": "overlays", "Plot": "a plot"}  # of ImageJ's metadata: what goes with a stack
_NO_UNIT = 1
# Tags that describe the file's layout, or that are read elsewhere (EXIF, XMP, IPTC, colours, a person's words).
_KNOWN = {*range(254, 260), 262, 263, 264, 265, 266, 269, 270, 271, 272, 273, 274, *range(277, 285), 285, 286, 287, 288}
_KNOWN |= {
    289,
    290,
    291,
    296,
    297,
    301,
    305,
    306,
    315,
    316,
    317,
    318,
    319,
    320,
    321,
    *range(322, 326),
    330,
    332,
    333,
    334,
}
_KNOWN |= {
    336,
    337,
    338,
    339,
    340,
    341,
    347,
    *range(512, 522),
    529,
    530,
    531,
    532,
    559,
    700,
    18246,
    18249,
    32932,
    32997,
}
_KNOWN |= {33432, 33723, 34377, 34665, 34675, 34853, 37724, *range(40091, 40096), 50341}


def read_record(page: Any, planes: int, *, whole: bool, turned: bool, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """The record of a page of tifffile's, and notes for the user on what is left out of it.

    Args:
        page: the first of `planes`, or one of them.
        planes: number of planes in the file.
        whole: whether all planes are kept in their order; otherwise what refers to the others is dropped.
        turned: whether the pixels are turned upright, which changes positions in them.
        size: (width, height) of the upright image.
    """
    lost: list[str] = []
    descriptions = []
    for text in (_raw(tag).rstrip(b"\0") for tag in page.tags if tag.code == _DESCRIPTION):
        if (kind := kind_of(text)) in ("OME", "ImageJ") and turned:
            lost.append(
                f"has a description of {kind} and is turned upright; the description may speak of its old sides"
            )
        true = text if whole and files_of_ome(text) == 1 else of_first_plane(text)
        true = text if true is None and kind.endswith(" ") and planes == 1 else true
        if true is None and kind != "tifffile":
            lost.append(f"has a description of {kind.strip()} that speaks of other planes; left out")
        elif true and kind == "OME" and (parts := gone(text, true)):
            lost.append(f"has {' and '.join(parts)} of OME, which speak of all its planes; left out")
        descriptions += [true] if true else []
    tags: list[tuple[int, str, int, Any]] = []
    geo = {code: page.tags.valueof(code) for code in _GEO if code in page.tags}
    if geo and turned:
        lost.append("has a place on the map (GeoTIFF) and is turned upright; its place is left out")
    else:
        tags += [_entry(code, _GEO[code], value) for code, value in geo.items()]
    tags += [_entry(code, kind, page.tags.valueof(code)) for code, kind in _GDAL.items() if code in page.tags]
    imagej = page.tags.valueof(_IJ_METADATA)
    metadata = dict(imagej) if isinstance(imagej, dict) else {}
    if metadata and not whole and planes > 1:
        if parts := [words for name, words in _OF_ALL.items() if metadata.get(name)]:
            lost.append(f"has {' and '.join(parts)} of ImageJ for all its planes; left out")
        metadata = _of_first(metadata)
    if others := sorted({tag.name for tag in page.tags if tag.code not in {*_KNOWN, *_GEO, *_GDAL, 50838, 50839}}):
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        lost.append(f"has data of other programs in tags ({', '.join(others[:4])}{more}); left out")
    resolution = None
    sides = tuple(page.tags.valueof(tag) for tag in (_X, _Y))
    if all(isinstance(side, tuple) and len(side) == 2 and min(side) > 0 for side in sides):
        resolution = (*(sides[::-1] if turned and size != (page.imagewidth, page.imagelength) else sides),)
        resolution = (*resolution, int(page.tags.valueof(_UNIT, 2)))
    record = TiffRecord(size, tuple(descriptions), resolution, tuple(tags), metadata)
    empty = not (descriptions or resolution or tags or metadata)
    return None if empty else record, lost


def _raw(tag: Any) -> bytes:
    value = tag.value
    return value if isinstance(value, bytes) else str(value).encode()


def _entry(code: int, kind: str, value: Any) -> tuple[int, str, int, Any]:
    if kind == "s":
        text = value if isinstance(value, bytes) else str(value).encode()
        return code, "s", 0, text
    values = tuple(value) if isinstance(value, (tuple, list)) or hasattr(value, "__len__") else (value,)
    return code, kind, len(values), values


def _of_first(metadata: dict[str, Any]) -> dict[str, Any]:
    """What ImageJ says about the first plane."""
    first = {"Labels": 1, "LUTs": 1, "Ranges": 2}
    kept = {
        name: value[: first[name]] if name in first and isinstance(value, (list, tuple)) else value
        for name, value in metadata.items()
    }
    return {name: value for name, value in kept.items() if name not in _OF_ALL}


def tags_of(
    record: TiffRecord, size: tuple[int, int], samples: int, bits: int, planes: int
) -> tuple[list[tuple[int, str, int, Any, bool]], dict[str, Any], list[str]]:
    """A record for an image of another size: extra tags and options for tifffile's writer, and what is lost."""
    fx, fy = (new / old for new, old in zip(size, record.size, strict=True))
    lost: list[str] = []
    machine = False
    tags: list[tuple[int, str, int, Any, bool]] = []
    for text in record.descriptions:
        kind = kind_of(text)
        machine = machine or kind in ("ImageJ", "OME", "SCIFIO")
        new = as_written(text, size, (fx, fy), samples, bits, planes)
        if new is None and kind != "tifffile":
            lost.append(f"the description of {kind.strip()}, which says its old size")
        elif new and kind == "OME" and (parts := gone(text, new)):
            lost.append(f"OME's {' and '.join(parts)}, which are for its old size")
        tags += [(_DESCRIPTION, "s", 0, new, True)] if new else []
    carried = {code: (kind, count, value) for code, kind, count, value in record.tags}
    for code, (kind, count, value) in carried.items():
        if (fx, fy) == (1, 1) or code not in (_PIXEL_SCALE, _TIEPOINTS, _MATRIX, _RPC):
            tags.append((code, kind, count, value, True))
        elif code == _RPC:
            lost.append("its rational polynomials (RPC), which are for its old size")
        else:
            tags.append((code, kind, count, _placed(code, value, fx, fy, _is_point(carried)), True))
    metadata = dict(record.imagej)
    if (fx, fy) != (1, 1) and {"ROI", "Overlays"} & set(metadata):
        lost.append("ImageJ's regions of interest, which are for its old size")
        metadata = {name: value for name, value in metadata.items() if name not in ("ROI", "Overlays")}
    if metadata:
        from tifffile.tifffile import imagej_metadata_tag

        tags += cast(list[tuple[int, str, int, Any, bool]], imagej_metadata_tag(metadata, "<"))
    options: dict[str, Any] = {}
    if record.resolution:
        x, y, unit = record.resolution
        says = (x, y, unit) != ((1, 1), (1, 1), _NO_UNIT)
        if machine and says and (fx, fy) != (1, 1):  # pixels per unit of what is seen, not of paper
            x, y = (_enlarged(side, f) for side, f in ((x, fx), (y, fy)))
        options = {"resolution": (x, y), "resolutionunit": unit}
    return tags, options, lost


def _enlarged(side: tuple[int, int], factor: float) -> tuple[int, int]:
    if factor == int(factor) and side[0] * factor < 2**32:
        return side[0] * int(factor), side[1]
    value = side[0] * factor / side[1]
    denominator = max(1, min(10**6, int(2**32 / max(value, 1)) - 1))
    return round(value * denominator), denominator


def _is_point(tags: dict[int, tuple[str, int, Any]]) -> bool:
    """Whether integer coordinates are the centres of pixels (GTRasterTypeGeoKey 2), not their corners."""
    keys = tags.get(_GEO_KEYS, ("", 0, ()))[2]
    return any(tuple(keys[at : at + 4]) == (1025, 0, 1, 2) for at in range(4, len(keys), 4))


def _placed(code: int, values: tuple[float, ...], fx: float, fy: float, is_point: bool) -> tuple[float, ...]:
    """Pixel scale, tie points or matrix of an image with `fx` and `fy` times as many pixels per side."""
    half = 0.5 if is_point else 0.0
    if code == _PIXEL_SCALE:
        return (values[0] / fx, values[1] / fy, *values[2:])
    if code == _TIEPOINTS:
        moved = []
        for at in range(0, len(values), 6):
            i, j = values[at : at + 2]
            moved += [(i + half) * fx - half, (j + half) * fy - half, *values[at + 2 : at + 6]]
        return tuple(moved)
    new = []
    for row in range(4):
        a, b, c, d = values[4 * row : 4 * row + 4]
        new += [a / fx, b / fy, c, d + a * (half / fx - half) + b * (half / fy - half)]
    return tuple(new)


def names_of(record: TiffRecord | None) -> set[str]:
    """What a record holds that only a TIFF can, by the names in `image_carriers.CARRIERS`."""
    if record is None:
        return set()
    codes = {code for code, *_ in record.tags}
    kinds = {kind_of(text) for text in record.descriptions} - {"", "tifffile"}
    there = {"stack": kinds, "geo": codes & set(_GEO), "gdal": codes & set(_GDAL), "imagej": record.imagej}
    return {name for name, what in there.items() if what}
