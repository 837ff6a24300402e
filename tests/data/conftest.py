"""Photos in a folder and the same packed."""

import pytest
from PIL import Image
from skimage import data

from serpent_ir.data import write_pack

SIZES = [(48, 48), (97, 130), (130, 98), (99, 130), (120, 40), (97, 130)]  # height, width


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder as FFHQ's: images are named by their numbers, a folder for every three of them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "._00000.png").write_bytes(b"what macOS notes of a file")
    for number, (height, width) in enumerate(SIZES):
        file = folder / f"{number // 3 * 3:05}" / f"{number:05}.png"
        file.parent.mkdir(exist_ok=True)
        photo = data.astronaut() if number % 2 else data.coffee()
        Image.fromarray(photo[number * 7 :, number * 9 :][:height, :width]).save(file)
    return folder


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "photos.serpent"
    write_pack([photos], file)
    return file
