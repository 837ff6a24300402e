"""XMP packets: claims about parts of a file that are gone are removed, and sizes are corrected.

A packet that makes no such claims stays the same, byte for byte, except for its orientation and sizes.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any
from xml.dom import DOMException, minidom
from xml.parsers.expat import ExpatError

_GOOGLE, _ADOBE = "http://ns.google.com/photos/1.0/", "http://ns.adobe.com/"
_CONTAINER, _ITEM, _CAMERA = f"{_GOOGLE}container/", f"{_GOOGLE}container/item/", f"{_GOOGLE}camera/"
_NOTE, _DC_TERMS, _BASIC = f"{_ADOBE}xmp/note/", "http://purl.org/dc/terms/", f"{_ADOBE}xap/1.0/"
_RDF, _XMLNS = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://www.w3.org/2000/xmlns/"
_REGIONS = ("http://www.metadataworkinggroup.com/schemas/regions/", "http://ns.microsoft.com/photo/1.2/")
# (Carrier of `image_carriers.CARRIERS`, start of a namespace, start of a property's name). Such a property claims it.
_CLAIMS = (
    ("gain_map", f"{_ADOBE}hdr-gain-map/", ""),
    ("gain_map", "http://ns.apple.com/HDRGainMap/", ""),
    ("auxiliary", "http://ns.apple.com/pixeldatainfo/", ""),
    ("depth_map", "http://ns.apple.com/depth", ""),
    ("depth_map", f"{_GOOGLE}depthmap/", ""),
    ("depth_map", f"{_GOOGLE}focus/", ""),
    ("depth_map", "http://ns.google.com/photos/dd/", ""),
    ("auxiliary", f"{_GOOGLE}image/", ""),
    ("sound", f"{_GOOGLE}audio/", ""),
    ("motion_video", _CAMERA, "MotionPhoto"),
    ("motion_video", _CAMERA, "MicroVideo"),
    ("motion_video", "http://ns.oplus.com/photos/", ""),
    ("motion_video", "http://ns.xiaomi.com/photos/", ""),
    ("extended_xmp", _NOTE, "HasExtendedXMP"),
    ("content_credentials", _DC_TERMS, "provenance"),
    ("thumbnail", _BASIC, "Thumbnails"),
)
_DAMAGED = (ExpatError, ValueError, LookupError, RecursionError, DOMException)
_SEMANTICS = {"GainMap": "gain_map", "RecoveryMap": "gain_map", "Depth": "depth_map", "MotionPhoto": "motion_video"}
_SEMANTICS |= {"DepthMap": "depth_map"}
_MIGHT_CLAIM = re.compile(
    rb"hdr-gain-map|ns\.apple\.com/|ns\.google\.com/photos/|ns\.oplus\.com|ns\.xiaomi\.com|HasExtendedXMP|:provenance"
    rb"|Thumbnails|/schemas/regions/|ns\.microsoft\.com/photo/1\.2"
)
_ORIENTATION = re.compile(rb"""(<(?:tiff:)?Orientation>\s*|tiff:Orientation\s*=\s*["'])([1-8])""")
_WIDTH = re.compile(rb"""((?:exif:PixelXDimension|tiff:ImageWidth)(?:>\s*|\s*=\s*["']))(\d+)""")
_HEIGHT = re.compile(rb"""((?:exif:PixelYDimension|tiff:ImageLength)(?:>\s*|\s*=\s*["']))(\d+)""")
_CROPPED = re.compile(rb"""GPano:CroppedAreaImageWidthPixels(?:>\s*|\s*=\s*["'])(\d+)""")
_PANORAMA = re.compile(rb"""(GPano:(?:CroppedArea|FullPano)[A-Za-z]+Pixels(?:>\s*|\s*=\s*["']))(\d+)""")


def orientation(xmp: Any) -> int:
    """The orientation that a packet gives, or 1."""
    match = _ORIENTATION.search(xmp) if isinstance(xmp, bytes) else None
    return int(match[2]) if match else 1


def upright(xmp: bytes) -> bytes:
    """The packet with orientation 1, if it gives an orientation."""
    return _ORIENTATION.sub(rb"\g<1>1", xmp)


def with_size(xmp: bytes | None, width: int, height: int) -> bytes | None:
    """The packet with this image size, if it gives a size."""
    if xmp is None:
        return None
    if (cropped := _CROPPED.search(xmp)) and (old := int(cropped[1])):  # a panorama gives positions within a sphere
        xmp = _PANORAMA.sub(lambda match: match[1] + b"%d" % round(int(match[2]) * width / old), xmp)
    xmp = _WIDTH.sub(rb"\g<1>%d" % width, xmp)
    return _HEIGHT.sub(rb"\g<1>%d" % height, xmp)


def without_claims(
    xmp: bytes, kept: Collection[str], *, video: int = 0, gap: int = 0, turned: bool = False
) -> tuple[bytes | None, set[str]]:
    """The packet without its claims about parts that are gone; and the carriers that were claimed and are not `kept`.

    Args:
        xmp: the packet.
        kept: carriers whose claims stay.
        video: bytes from the beginning of a motion photo's video to the end of the file. They are written where the
            packet gives them.
        gap: bytes between the image and that video.
        turned: whether the image was turned upright, so that regions in it have moved.

    A packet that makes claims and cannot be parsed is left out: the result is None, and all that it might claim.
    """
    if not _MIGHT_CLAIM.search(xmp):
        return xmp, set()
    try:
        return _stripped(xmp, kept, video, gap, turned)
    except _DAMAGED:
        return None, {"damaged_xmp"}


def _stripped(xmp: bytes, kept: Collection[str], video: int, gap: int, turned: bool) -> tuple[bytes, set[str]]:
    document = _parsed(xmp)
    gone = _strip_directories(document, kept, video, gap)
    used = set()
    for element in list(_elements(document)):
        for owner, node in [(element, a) for a in _attributes(element)] + [(element.parentNode, element)]:
            name = _claimed_by(node, turned)
            if name and name not in kept:
                gone.add(name)
                _remove(owner, node)
            elif name and video and node.localName == "MicroVideoOffset":
                _set_value(node, str(video))
    for element in _elements(document):
        used |= {element.namespaceURI, *(a.namespaceURI for a in _attributes(element))}
    claims = (*(start for _, start, _ in _CLAIMS), _CONTAINER, *_REGIONS)
    for element in _elements(document):  # a namespace declaration alone would still name what is gone
        for node in _attributes(element, declarations=True):
            if node.namespaceURI == _XMLNS and node.value.startswith(claims) and node.value not in used:
                element.removeAttributeNode(node)
    if not gone and not video:
        return xmp, gone
    return "".join(node.toxml() for node in document.childNodes).encode(), gone


def video_start(xmp: bytes, total: int) -> int | None:
    """Where the video of a motion photo begins in a file of `total` bytes, according to its XMP data."""
    if not _MIGHT_CLAIM.search(xmp):
        return None
    try:
        document = _parsed(xmp)
        end = total
        for item in reversed([e for e in _elements(document) if _property(e, "Semantic")]):
            end -= int(_property(item, "Length") or 0) + int(_property(item, "Padding") or 0)
            if _property(item, "Semantic") == "MotionPhoto":
                return end
        for element in _elements(document):
            for node in [*_attributes(element), element]:
                if node.namespaceURI == _CAMERA and node.localName == "MicroVideoOffset":
                    return total - int(_value(node))
    except _DAMAGED:
        pass
    return None


def _parsed(xmp: bytes) -> minidom.Document:
    if b"<!DOCTYPE" in xmp or b"<!ENTITY" in xmp:  # they have no place in XMP, and may grow without bound
        raise ExpatError
    return minidom.parseString(xmp.strip(b"\0 \r\n\t"))


def _strip_directories(document: Any, kept: Collection[str], video: int, gap: int) -> set[str]:
    """Remove the items of containers that are gone, and write where a video that is kept begins."""
    gone: set[str] = set()
    for directory in [e for e in _elements(document) if e.namespaceURI == _CONTAINER and e.localName == "Directory"]:
        left = []
        for item in [e for e in _elements(directory) if _property(e, "Semantic")]:
            semantic = _property(item, "Semantic")
            name = _SEMANTICS.get(semantic, "auxiliary")
            if semantic == "Primary" or name in kept:
                left.append((semantic, item))
                continue
            gone.add(name)
            while item.parentNode is not directory and item.localName != "li":
                item = item.parentNode
            _remove(item.parentNode, item)
        if all(semantic == "Primary" for semantic, _ in left):
            _remove(directory.parentNode, directory)
        for semantic, item in left:
            if semantic == "MotionPhoto" and video:
                _set_property(item, "Length", video)
            elif semantic == "Primary" and (gap or _property(item, "Padding")):
                _set_property(item, "Padding", gap)
    return gone


def _claimed_by(node: Any, turned: bool) -> str | None:
    """The carrier that an element or an attribute refers to."""
    space, local = node.namespaceURI or "", node.localName or ""
    if turned and space.startswith(_REGIONS) and local in ("Regions", "RegionInfo"):
        return "regions"
    return next((c for c, start, first in _CLAIMS if space.startswith(start) and local.startswith(first)), None)


def _elements(node: Any) -> Iterator[Any]:
    for child in list(node.childNodes):
        if child.nodeType == child.ELEMENT_NODE:
            yield child
            yield from _elements(child)


def _attributes(element: Any, *, declarations: bool = False) -> list[Any]:
    nodes = [element.attributes.item(i) for i in range(element.attributes.length)]
    return [node for node in nodes if declarations or node.namespaceURI != _XMLNS]


def _remove(owner: Any, node: Any) -> None:
    if node.nodeType == node.ATTRIBUTE_NODE:
        owner.removeAttributeNode(node)
    elif owner is not None:
        owner.removeChild(node)


def _property(item: Any, name: str) -> str:
    """A property of an item, given as an attribute or an element; "" if there is none."""
    if node := item.getAttributeNodeNS(_ITEM, name):
        return node.value
    children = (c for c in item.childNodes if c.nodeType == c.ELEMENT_NODE)
    return next((_value(c) for c in children if (c.namespaceURI, c.localName) == (_ITEM, name)), "")


def _set_property(item: Any, name: str, value: int) -> None:
    for child in item.childNodes:
        if (child.namespaceURI, child.localName) == (_ITEM, name):
            _set_value(child, str(value))
            return
    prefix = next((n.prefix for n in (*_attributes(item), *item.childNodes) if n.namespaceURI == _ITEM), "Item")
    item.setAttributeNS(_ITEM, f"{prefix}:{name}", str(value))


def _value(node: Any) -> str:
    if node.nodeType == node.ATTRIBUTE_NODE:
        return node.value
    return "".join(c.data for c in node.childNodes if c.nodeType == c.TEXT_NODE).strip()


def _set_value(node: Any, value: str) -> None:
    if node.nodeType == node.ATTRIBUTE_NODE:
        node.value = value
        return
    while node.firstChild:
        node.removeChild(node.firstChild)
    node.appendChild(node.ownerDocument.createTextNode(value))
