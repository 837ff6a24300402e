"""Descriptions in TIFFs of the file's planes and their scale: by ImageJ, OME, tifffile, SCIFIO and scanners.

They are rewritten so that they are true of what a file holds: its first plane only, or all planes at another size.
Sources: ImageJ's TiffDecoder and FileInfo, the OME schema 2016-06, SCIFIO's TIFFFormat, tifffile's `shaped` files.
"""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

_STACK = ("images", "channels", "slices", "frames", "hyperstack", "mode", "loop", "fps", "finterval")
# Descriptions by scanners and microscopes. They give sizes and planes in their own words and are not rewritten.
_OTHERS = {
    "ScanImage": rb"(?m)^(?:SI\.|scanimage\.|frameNumbers? ?=|state\.\w+)",
    "Micro-Manager": rb"\{\s*\"(?:Summary|FrameIndex|PixelSizeUm|MicroManagerVersion|Slice)\"",
    "Leica": rb"<scn\b|http://www\.leica-microsystems\.com|Leica SCN",
    "Aperio": rb"^Aperio ",
    "MetaMorph": rb"<MetaData>|^Acquired from|^Exposure: ",
    "Philips": rb"PIM_DP_UFS|<DataObject ObjectType=",
    "PerkinElmer": rb"<PerkinElmer-QPI",
    "Trestle": rb"^Background Color=",
    "Ventana": rb"<iScan|<EncodeInfo",
    "FluoView": rb"^\[(?:Version Info|Acquisition Parameters)",
    "Indica": rb"<indica",
    "OME": rb"<BinaryOnly|<!DOCTYPE[^>]*OME",
}


def kind_of(text: bytes) -> str:
    """The program whose description this is; "" for a person's words."""
    if text.startswith(b"ImageJ="):
        return "ImageJ"
    if text.startswith(b"SCIFIO="):
        return "SCIFIO"
    if text.startswith((b'{"shape":', b"shape=(")):
        return "tifffile"
    for name, pattern in _OTHERS.items():
        if re.search(pattern, text[:20000]):
            return f"{name} "
    return "OME" if re.search(rb"<(?:\w+:)?OME\b", text[:2000]) and text.rstrip(b"\0 \n\r").endswith(b"OME>") else ""


_PARTS = {"ROI": "regions of interest", "Plate": "plates", "Dataset": "datasets"}


def gone(before: bytes, after: bytes) -> list[str]:
    """Which parts of an OME description another one of it no longer has, in words."""
    return [
        words
        for name, words in _PARTS.items()
        if len(re.findall(rb"<(?:\w+:)?%s\b" % name.encode(), before))
        > len(re.findall(rb"<(?:\w+:)?%s\b" % name.encode(), after))
    ]


def of_first_plane(text: bytes) -> bytes | None:
    """A description that is true of the first plane alone; None if it cannot be made so."""
    kind = kind_of(text)
    if kind == "ImageJ":
        return _lines(dict.fromkeys(_STACK), text)
    if kind == "SCIFIO":
        axes = _value(text, "axes").split(",")
        keep = [place for place, axis in enumerate(axes) if axis in ("X", "Y")]
        shorter = {name: _picked(_value(text, name), keep) for name in ("axes", "lengths", "scales", "units")}
        return _lines({**dict.fromkeys(_STACK), **{name: value or None for name, value in shorter.items()}}, text)
    if kind == "tifffile":
        return _shaped(text, None)
    if kind == "OME":
        return _ome_of_first_plane(text)
    return None if kind else text


def as_written(
    text: bytes, size: tuple[int, int], factors: tuple[float, float], samples: int, bits: int, planes: int
) -> bytes | None:
    """A description that is true of planes of another `size`, (width, height), `factors` times the old one.

    `planes` is the number of planes in the file from this one on. None if it cannot be made true.
    """
    kind, (fx, fy) = kind_of(text), factors
    if kind == "tifffile":
        return _shaped(text, [*size[::-1], *([samples] if samples > 1 else [])], planes)
    if kind == "OME":
        return _ome_as_written(text, size, factors, samples, bits)
    if factors == (1, 1) or not kind:
        return text
    if kind == "ImageJ":
        origins = (("xorigin", fx), ("yorigin", fy))
        return _lines({name: _times(value, f) for name, f in origins if (value := _value(text, name))}, text)
    if kind == "SCIFIO":
        axes = _value(text, "axes").split(",")
        by = [{"X": fx, "Y": fy}.get(axis, 1.0) for axis in axes]
        lengths, scales = (_value(text, name).split(",") for name in ("lengths", "scales"))
        new = {
            "lengths": ",".join(map(_times, lengths, by)),
            "scales": ",".join(_times(x, 1 / f) for x, f in zip(scales, by, strict=False)),
        }
        return _lines({name: value for name, value in new.items() if value}, text)
    return None


def _times(value: str, factor: float) -> str:
    try:
        return f"{float(value) * factor:.12g}"
    except ValueError:
        return value


def _picked(value: str, places: Sequence[int]) -> str:
    parts = value.split(",")
    return ",".join(parts[place] for place in places if place < len(parts))


def _value(text: bytes, name: str) -> str:
    found = re.search(rb"(?m)^" + name.encode() + rb"=(.*?)\r?$", text)
    return found[1].decode("latin-1") if found else ""


def _lines(values: dict[str, str | None], text: bytes) -> bytes:
    """Lines of `name=value` with new values, and without the lines whose new value is None."""
    kept = []
    for line in text.split(b"\n"):
        name, equals, _ = line.partition(b"=")
        new = values.get(name.decode("latin-1"), "") if equals else ""
        if new:
            kept.append(name + b"=" + new.encode("latin-1"))
        elif new is not None:
            kept.append(line)
    return b"\n".join(kept)


def _shaped(text: bytes, shape: Sequence[int] | None, planes: int = 1) -> bytes | None:
    """tifffile's description of an array's shape, for the planes there are now; without a shape if there is one."""
    try:
        values = json.loads(text.rstrip(b"\0"))
    except ValueError:
        return None
    old, axes = values.pop("shape"), values.pop("axes", None)
    values.pop("truncated", None)
    if shape is not None:
        for inner in (2, 3):
            leading = old[:-inner]
            if _product(leading) == planes > 1 and _product(old) and len(old) > inner:
                new = [*leading, *shape]
                values = {"shape": new, **({"axes": axes} if axes and len(axes) == len(new) else {}), **values}
                break
    return json.dumps(values).encode() if values else None


def _product(values: Sequence[int]) -> int:
    product = 1
    for value in values:
        product *= value
    return product


# OME


def _parsed(text: bytes) -> tuple[ET.Element, bytes]:
    """The root of OME's XML, and its default namespace, which is removed here and put back by `_serialized`."""
    space = re.search(rb"<OME\b[^>]*?(\sxmlns=\"[^\"]*\")", text)
    bare = text.rstrip(b"\0") if space is None else text[: space.start(1)] + text[space.end(1) :].rstrip(b"\0")
    return ET.fromstring(bare), space[1] if space else b""


def _serialized(root: ET.Element, space: bytes) -> bytes:
    text = ET.tostring(root, encoding="unicode").encode()
    return b'<?xml version="1.0" encoding="UTF-8"?>' + text.replace(b"<OME", b"<OME" + space, 1)


def _named(parent: ET.Element, name: str) -> list[ET.Element]:
    return [child for child in parent if isinstance(child.tag, str) and child.tag.rpartition("}")[2] == name]


def _all_pixels(root: ET.Element) -> Iterator[tuple[ET.Element, ET.Element]]:
    for image in _named(root, "Image"):
        for pixels in _named(image, "Pixels"):
            yield image, pixels


def files_of_ome(text: bytes) -> int:
    """How many files OME's description refers to."""
    return len(set(re.findall(rb"FileName=\"([^\"]*)\"", text))) or 1


def _ome_of_first_plane(text: bytes) -> bytes | None:
    try:
        root, space = _parsed(text)
        here, found = root.get("UUID"), None
        for image, pixels in _all_pixels(root):
            for data in _named(pixels, "TiffData") or [ET.Element("TiffData")]:
                uuid = next(iter(_named(data, "UUID")), None)
                if int(data.get("IFD", 0)) == 0 and (uuid is None or here is None or (uuid.text or "") == here):
                    found = found or (image, pixels, {axis: int(data.get(f"First{axis}", 0)) for axis in "CZT"})
        if found is None:
            return None
        image, pixels, plane = found
        alone = len(_named(root, "Image")) == 1 and files_of_ome(text) == 1
        channels = _named(pixels, "Channel")
        starts, count = [], 0
        for channel in channels:
            starts.append(count)
            count += int(channel.get("SamplesPerPixel", 1))
        own = next((c for c, start in zip(channels, starts, strict=True) if start == plane["C"]), None)
        samples = own.get("SamplesPerPixel", "1") if own is not None else "1"
        if alone and [pixels.get(f"Size{axis}", "1") for axis in "CZT"] == [samples, "1", "1"]:
            return text
        gone = {other.get("ID") for other in _named(root, "Image") if other is not image}
        for other in [*_named(root, "Image"), *_named(root, "Plate"), *_named(root, "Dataset"), *_named(root, "ROI")]:
            if other is not image:
                root.remove(other)
        for child in [*_named(image, "ROIRef"), *_named(image, "DatasetRef")]:
            image.remove(child)
        for parent in list(root.iter()):
            for child in _named(parent, "ImageRef"):
                if child.get("ID") in gone:
                    parent.remove(child)
        pixels.attrib |= {"SizeC": samples, "SizeZ": "1", "SizeT": "1"}
        for channel in channels:
            if channel is not own:
                pixels.remove(channel)
        tiff_data = _named(pixels, "TiffData")
        place = list(pixels).index(tiff_data[0]) if tiff_data else len(pixels) - len(_named(pixels, "Plane"))
        for data in tiff_data:
            pixels.remove(data)
        prefix = pixels.tag.removesuffix("Pixels")
        one = {"IFD": "0", "FirstC": "0", "FirstZ": "0", "FirstT": "0", "PlaneCount": "1"}
        pixels.insert(place, ET.Element(f"{prefix}TiffData", one))
        for other in _named(pixels, "Plane"):
            if {axis: int(other.get(f"The{axis}", 0)) for axis in "CZT"} == plane:
                other.attrib |= {"TheC": "0", "TheZ": "0", "TheT": "0"}
            else:
                pixels.remove(other)
        return _serialized(root, space)
    except (ET.ParseError, ValueError):
        return None


def _ome_as_written(
    text: bytes, size: tuple[int, int], factors: tuple[float, float], samples: int, bits: int
) -> bytes | None:
    try:
        root, space = _parsed(text)
    except ET.ParseError:
        return None
    changed = False

    def put(element: ET.Element, values: dict[str, str]) -> None:
        nonlocal changed
        for name, value in values.items():
            changed = changed or element.get(name) != value
            element.set(name, value)

    for image, pixels in _all_pixels(root):
        if pixels.get("Type") != f"uint{bits}":
            put(pixels, {"Type": f"uint{bits}"})
            pixels.attrib.pop("SignificantBits", None)
        if pixels.get("BigEndian", "false") != "false":
            put(pixels, {"BigEndian": "false"})
        channels = _named(pixels, "Channel")
        if len(channels) == 1 and channels[0].get("SamplesPerPixel", "1") != str(samples):
            put(channels[0], {"SamplesPerPixel": str(samples)})
            put(pixels, {"SizeC": str(samples)})
        for data in _named(pixels, "TiffData"):
            for uuid in _named(data, "UUID"):  # it refers to this very file, under its old name
                data.remove(uuid)
                changed = True
        if factors != (1, 1):
            for axis, factor in zip("XY", factors, strict=True):
                side = int(pixels.get(f"Size{axis}", 0))
                put(pixels, {f"Size{axis}": str(round(side * factor))})
                if value := pixels.get(f"PhysicalSize{axis}"):
                    put(pixels, {f"PhysicalSize{axis}": _times(value, 1 / factor)})
            for reference in _named(image, "ROIRef"):
                image.remove(reference)
    if factors != (1, 1):
        for region in _named(root, "ROI"):  # their positions are in pixels
            root.remove(region)
    return _serialized(root, space) if changed else text
