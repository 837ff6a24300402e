"""Segments of JPEG files."""

import re

import numpy as np
import pytest

from serpent_ir.image import jpeg


@pytest.mark.parametrize("near, far", [(64, 1 << 20), (1, 7), (3, 1)])
def test_markers_are_found_wherever_they_lie(near, far, monkeypatch):
    """In bytes among which markers, their fill bytes, stuffed zeros and restarts are common; the end may cut one."""
    monkeypatch.setattr(jpeg, "_NEAR", near)
    monkeypatch.setattr(jpeg, "_FAR", far)
    drawn = np.random.default_rng(3)
    for length in (*range(9), *range(60, 140)):
        data = drawn.choice(
            [0xFF, 0, 0xD0, 0xD7, 0xD8, 0xCF, 0xE1, 0x41], length, p=[0.3, 0.3, *[0.06] * 5, 0.1]
        ).tobytes()
        place, expected = 0, []
        while match := re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])").search(data, place):
            expected.append(place := match.end())
        place, found = 0, []
        while place := jpeg._after_marker(data, place):
            found.append(place)
        assert found == expected
