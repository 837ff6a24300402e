"""Multiply-accumulates of the networks that scan, against counts by hand."""

import math

import pytest
import torch

from serpent_ir.models import create_model
from serpent_ir.profiling.count import count

H, W = 32, 48
L = H * W


def projected_scans(d: int, N: int, rank: int, ways: int, share: int = 1) -> int:
    """A position's projection to dt, B and C, that of dt, and the scan with its skip, in so many ways.

    Of the d channels each way has one `share`-th.
    """
    return ways * (d // share) * ((rank + 2 * N) + rank + 6 * N + 1)


def around(c: int, d: int, *, gate: bool = True) -> int:
    """A position's norm, input projection, depthwise convolution of 3x3, norm and output projection of a block."""
    return 5 * c + c * d * (2 if gate else 1) + 9 * d + 5 * d + d * c


def frame(c: int, groups: int, upsample: int) -> int:
    """A position's first, last and group convolutions of 3x3, and two norms, in SwinIR's frame."""
    return 9 * (3 * c + c * c * (groups + 1) + c * upsample) + 10 * c


def mambair_light() -> int:
    c, d, blocks = 60, 72, 24
    beside = 5 * c + c * 30 + 9 * 30 + 30 * c + 9 * c  # norm, and the convolutions of the light block
    pooled = blocks * 2 * (c // 30) * c  # channel attention, once for an image
    return L * (frame(c, 4, 12) + blocks * (around(c, d) + projected_scans(d, 10, 4, 4) + beside)) + pooled


def mair_tiny() -> int:
    c, d, blocks = 60, 66, 24
    gating = blocks * 4 * d * 4  # of the means, once for an image
    beside = 5 * c + 2 * c * 96
    return L * (frame(c, 4, 12) + blocks * (around(c, d) + projected_scans(d, 1, 4, 4) + beside)) + gating


def pfvm() -> int:
    c, d, blocks = 60, 120, 4
    beside = 5 * c + 9 * c * c
    return L * (frame(c, 1, 48) + blocks * (around(c, d) + projected_scans(d, 16, 4, 4) + beside))


def dvmsr() -> int:
    c, d, N, rank, blocks = 60, 120, 16, 4, 8
    inside = 5 * c + 2 * c * d + d * (rank + 2 * N) + d * rank + d * (6 * N + 1 + 1) + d * c
    tail = blocks * 4 * d * 3  # the causal convolution runs three positions past the end
    return L * (frame(c, 4, 48) + blocks * (inside + 4 * d)) + tail


def eamamba_sr() -> int:
    c, N, rank, blocks = 64, 10, 4, 16
    block = around(c, c) + projected_scans(c, N, rank, 8, share=8) + 5 * c + c * c + c // 2 * c
    enlarged = 9 * (c * c + 4 * c * c + 4 * c * 3)  # before the upsampler, in it, and at four times the positions
    return L * (9 * (3 * c + c * c * (4 + 1)) + 5 * c + blocks * block + enlarged)


COUNTS = [
    ("mambair_light", {"upsampler": "pixelshuffledirect", "scale": 2}, mambair_light),
    ("mair_tiny", {"upsampler": "pixelshuffledirect", "scale": 2}, mair_tiny),
    ("pfvm", {"upsampler": "pixelshuffledirect", "scale": 4}, pfvm),
    ("dvmsr", {"upsampler": "pixelshuffledirect", "scale": 4}, dvmsr),
    ("eamamba_sr", {"scale": 2}, eamamba_sr),
]


@pytest.mark.parametrize(("name", "options", "by_hand"), COUNTS, ids=lambda x: x if isinstance(x, str) else "")
def test_macs_are_those_counted_by_hand(name, options, by_hand):
    with torch.device("meta"):
        model = create_model(name, **options)
    assert count(model, H, W).macs == by_hand()
    assert count(model, 2 * H, W).macs == pytest.approx(2 * by_hand(), rel=1e-4)


def test_a_scan_of_classes_and_its_windows_are_counted():
    """MambaIRv2: what depends on the window is all that a larger window adds."""
    c, heads, layers = 48, 4, 20
    with torch.device("meta"):
        small, large = (create_model("mambairv2_light", window_size=window) for window in (8, 16))
    assert heads * (c // heads) == c
    more = L * layers * 2 * c * (16**2 - 8**2)  # queries by keys, and weights by values
    assert math.isclose(count(large, H, W).macs - count(small, H, W).macs, more)
