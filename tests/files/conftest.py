"""A small batch of images, and weights to restore it with."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import untrained_weights


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Untrained weights of serpent_b for deblur."""
    return untrained_weights(tmp_path_factory.mktemp("weights"))["deblur"]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Six images in three folders; the current folder is the one around them."""
    for index, name in enumerate(
        ["a.png", "b.jpg", "trip/c.png", "trip/d.tif", "trip/far/e.png", "other.txt", "f.bmp"]
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            path.write_text("no image")
        else:
            Image.fromarray(np.full((9 + index, 12, 3), 40 * index, np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return Path("photos")
