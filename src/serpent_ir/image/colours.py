"""ICC profiles of colour spaces that a file gives by numbers (ITU-T H.273) or by gamma and primaries.

Pillow's ImageCms can only make an sRGB profile. Sources: ITU-T H.273 (primaries, transfer functions), ICC.1:2022
(profiles and their tag `cicp`), Bradford's chromatic adaptation of the white point.
"""

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from serpent_ir.image.png import chunks

_D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
# Red, green, blue and white for the numbers of H.273.
_PRIMARIES = {
    1: _SRGB,
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), (0.310, 0.316)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), _D65),
}
_NAMES = {1: "BT.709", 9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
PQ, HLG = 16, 18
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def is_hdr(cicp: bytes) -> bool:
    """Whether four numbers of H.273 (primaries, transfer, matrix, full range) describe an HDR image."""
    return cicp[1] in (PQ, HLG)


def icc_of_cicp(cicp: bytes, *, grey: bool = False) -> bytes | None:
    """An ICC profile of the colours that four numbers of H.273 describe; None for numbers that are not defined here.

    With `grey` the profile is for grey samples and describes the curve only.
    """
    primaries, transfer = cicp[0], cicp[1]
    curve = _curve(transfer)
    if primaries not in _PRIMARIES or curve is None:
        return None
    name = f"{_NAMES.get(primaries, f'primaries {primaries}')}, {_TRANSFERS.get(transfer, f'transfer {transfer}')}"
    return _profile(_PRIMARIES[primaries], curve, name, cicp if is_hdr(cicp) else b"", grey)


_TRANSFERS = {1: "sRGB", 6: "sRGB", 13: "sRGB", 14: "sRGB", 15: "sRGB", 8: "linear", PQ: "PQ", HLG: "HLG"}


def icc_of_gamma(png_chunks: bytes, *, grey: bool = False) -> bytes | None:
    """An ICC profile of a PNG's gAMA and cHRM, like `icc_of_cicp`; None if they describe sRGB, or nothing."""
    gamma, xy = 0.0, _SRGB
    for kind, content, _ in chunks(b"\x89PNG\r\n\x1a\n" + png_chunks):
        if kind == b"sRGB":
            return None
        if kind == b"gAMA" and len(content) == 4:
            gamma = int.from_bytes(content, "big") / 100000
        elif kind == b"cHRM" and len(content) == 32:
            values = [value / 100000 for value in struct.unpack(">8I", content)]
            xy = ((values[2], values[3]), (values[4], values[5]), (values[6], values[7]), (values[0], values[1]))
    is_srgb = not gamma or abs(gamma - 0.45455) < 0.002
    if is_srgb and np.abs(np.array(xy) - _SRGB).max() < 0.002:
        return None
    if min(np.array(xy)[:, 1]) <= 0 or (gamma and not 0.01 < gamma < 100):
        return None
    curve = _parametric_srgb() if is_srgb else b"curv" + struct.pack(">IIH", 0, 1, _fixed8(1 / gamma))
    return _profile(xy, curve, "gamma and primaries of a PNG", b"", grey)


def _curve(transfer: int) -> bytes | None:
    """The tag for a curve from samples to light."""
    if transfer in (1, 6, 13, 14, 15):  # viewers show the camera curves of BT.709 and BT.2020 like sRGB's
        return _parametric_srgb()
    if transfer in (4, 5):
        return b"curv" + struct.pack(">IIH", 0, 1, _fixed8(2.2 if transfer == 4 else 2.8))
    if transfer == 8:
        return b"curv" + struct.pack(">II", 0, 0)
    sampled: dict[int, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {PQ: _pq, HLG: _hlg}
    if transfer not in sampled:
        return None
    values = np.rint(sampled[transfer](np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv" + struct.pack(">II", 0, 1024) + values.tobytes()


def _pq(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084: light as a share of 10,000 cd/m2."""
    p = v ** (1 / 78.84375)
    return (np.maximum(p - 0.8359375, 0) / (18.8515625 - 18.6875 * p)) ** (1 / 0.1593017578125)


def _hlg(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """ARIB STD-B67: light of the scene."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(v <= 0.5, v * v / 3, (np.exp((v - c) / a) + b) / 12)


def _parametric_srgb() -> bytes:
    values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + struct.pack(">IHH5i", 0, 3, 0, *(_fixed16(v) for v in values))


def _profile(xy: tuple[tuple[float, float], ...], curve: bytes, name: str, cicp: bytes, grey: bool) -> bytes:
    """A version 4 display profile: primaries as columns of a matrix and one curve for all; for grey the curve only."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in xy])
    white = columns[3]
    rgb = columns[:3].T * np.linalg.solve(columns[:3].T, white)
    chad = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD
    adapted = chad @ rgb
    tags = {
        b"desc": _text(name),
        b"cprt": _text("No copyright, use freely"),
        b"wtpt": _xyz(_D50),
        b"chad": b"sf32" + struct.pack(">I9i", 0, *(_fixed16(v) for v in chad.ravel())),
    }
    if grey:
        tags[b"kTRC"] = curve
    else:
        tags |= {kind: _xyz(adapted[:, i]) for i, kind in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    if cicp and not grey:
        tags[b"cicp"] = b"cicp" + bytes(4) + cicp
    offset = 132 + 12 * len(tags)
    entries, body, places = b"", b"", {}
    for kind, content in tags.items():
        if content not in places:
            places[content] = offset + len(body)
            body += content + bytes(-len(content) % 4)
        entries += kind + struct.pack(">II", places[content], len(content))
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), bytes(4), 0x04400000, b"mntr", b"GRAY" if grey else b"RGB ", b"XYZ "
    )
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp")
    header = header.ljust(68, b"\0") + _xyz(_D50)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc" + struct.pack(">III4sII", 0, 1, 12, b"enUS", len(encoded), 28) + encoded


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(_fixed16(v) for v in values))


def _fixed16(value: float) -> int:
    return round(value * 65536)


def _fixed8(value: float) -> int:
    return min(round(value * 256), 65535)
