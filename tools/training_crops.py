"""Crops of photographs of 512x512 pixels, as the last runs of the weights `photo`, `photo_x2` and `inpaint` saw them.

    python tools/training_crops.py ../shared/data/free/train -o runs/crops

Writes three packed sets of images of 256x256 pixels:

- `quarters.serpent`: the four quarters of each.
- `halves.serpent`: each at half its size. WebP keeps chroma at half the resolution, so only these have fine colours.
- `soft.serpent`: two random parts of each of these, enlarged by 1.45 to 2.2: as soft as a camera's own pixels are.
  Networks that saw sharp pictures alone sharpened what was merely soft.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from serpent_ir.data import write_pack
from serpent_ir.image.folders import find_images

SIDE = 256
SOFT = (116, 176)
"""Least and greatest side, in pixels, of a part that is enlarged."""


def crops(file: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Set, name and pixels of each crop of an image. What is random depends on its name alone."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.size != (2 * SIDE, 2 * SIDE):
        raise SystemExit(f"{file}: {image.width}x{image.height} px; it must be {2 * SIDE} px on each side")
    for i in range(4):
        left, top = SIDE * (i % 2), SIDE * (i // 2)
        yield "quarters", f"{file.stem}_{i}", image.crop((left, top, left + SIDE, top + SIDE))
    half = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    yield "halves", file.stem, half
    draw = random.Random(file.stem)
    for i in range(2):
        side = draw.randint(*SOFT)
        left, top = draw.randint(0, SIDE - side), draw.randint(0, SIDE - side)
        part = half.crop((left, top, left + side, top + side))
        yield "soft", f"{file.stem}_{i}", part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in find_images(args.folder):
            for name, stem, image in crops(file):
                (Path(folder) / name).mkdir(exist_ok=True)
                image.save(Path(folder) / name / f"{stem}.png", compress_level=1)
        for name in ("quarters", "halves", "soft"):
            records = write_pack([Path(folder) / name], args.out / f"{name}.serpent")
            print(f"{args.out / name}.serpent: {len(records)} images")


if __name__ == "__main__":
    main()
