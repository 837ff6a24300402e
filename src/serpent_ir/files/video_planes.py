"""Samples in the planes of a video's frames, read and written as arrays."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av


def rows_of(plane: Any) -> np.ndarray:
    """The bytes of a plane, (rows, bytes per row). They are writable if the frame is."""
    return np.asarray(memoryview(plane)).view(np.uint8)[: plane.height * plane.line_size].reshape(plane.height, -1)


def fill(rows: np.ndarray, others: np.ndarray) -> None:
    """Write another plane's rows. If it has fewer rows, its last one is repeated."""
    width = min(rows.shape[1], others.shape[1])
    count = min(len(rows), len(others))
    rows[:count, :width] = others[:count, :width]
    rows[count:, :width] = others[-1, :width]


def half(frame: "av.VideoFrame", parity: int) -> "av.VideoFrame":
    """A field of a frame: of each plane its even rows (parity 0) or its odd rows (1)."""
    import av

    half = av.VideoFrame(frame.width, (frame.height + 1 - parity) // 2, frame.format.name)
    for plane, whole in zip(half.planes, frame.planes, strict=True):
        fill(rows_of(plane), rows_of(whole)[parity::2])
    half.colorspace, half.color_range = frame.colorspace, frame.color_range
    return half


def samples(frame: "av.VideoFrame", depth: int = 0) -> np.ndarray:
    """The plane of RGB, RGBA or grey, (H, W) or (H, W, C), uint8 or uint16, scaled up from `depth` bits if given."""
    parts = len(frame.format.components)
    bits = frame.format.components[0].bits
    kind = np.dtype(np.uint8 if bits == 8 else "<u2")
    rows = rows_of(frame.planes[0])[:, : frame.width * parts * kind.itemsize]
    pixels = np.ascontiguousarray(rows).view(kind)
    if parts > 1:
        pixels = pixels.reshape(frame.height, frame.width, parts)
    if depth and depth not in (8, 16):
        return np.rint(pixels * (65535 / (2**depth - 1))).astype(np.uint16)
    return pixels


def put(frame: "av.VideoFrame", pixels: np.ndarray, depth: int = 0) -> None:
    """Write back what `_samples` read."""
    full = np.iinfo(pixels.dtype).max
    if depth and 2**depth - 1 != full:
        pixels = np.rint(pixels * ((2**depth - 1) / full)).astype(np.uint8 if depth == 8 else "<u2")
    lines = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    rows_of(frame.planes[0])[:, : lines.shape[1]] = lines


def colour_planes(frame: "av.VideoFrame") -> list[np.ndarray]:
    """The chroma samples of planar YUV, one array per plane; none for other formats."""
    form = frame.format
    if not form.name.startswith("yuv") or not form.is_planar or form.is_big_endian:
        return []
    kind = np.dtype(np.uint8 if form.components[1].bits == 8 else "<u2")
    return [
        rows_of(plane)[:, : plane.width * kind.itemsize].view(kind)
        for plane in (frame.planes[part.plane] for part in form.components[1:3])
    ]


def without_colour(frame: "av.VideoFrame") -> bool:
    """Whether chroma planes hold no colour: a black-and-white film, or grey H.264 as FFmpeg decodes it."""
    planes = colour_planes(frame)
    return bool(planes) and all((plane == 1 << frame.format.components[1].bits - 1).all() for plane in planes)


def take_colour_out(frame: "av.VideoFrame") -> None:
    for plane in colour_planes(frame):
        plane[:] = 1 << frame.format.components[1].bits - 1
