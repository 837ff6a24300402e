"""The gallery of the documentation: pictures before and after, of free photos and of drawings, failures included.

    make gallery        (or: python tools/gallery.py)

Writes docs/gallery/*.jpg and docs/gallery.md, which names the hash of the weights, and docs/real.jpg, the contact sheet
of the task `real`. Photos are those that scikit-image
ships; drawings are made here. Run it again after new weights, and read what it says under each picture.
"""

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from serpent_ir import Restorer, create_degradation
from serpent_ir.degradations import evaluation_generator
from serpent_ir.image import to_tensor
from serpent_ir.metrics import psnr
from serpent_ir.models import WEIGHTS_DIR

DOCS = Path(__file__).parents[1] / "docs"
SIDE, MARGIN, CAPTION = 256, 8, 26
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """A picture of the gallery: `clean` (H, W, 3), what is done to it (a task, or "" for nothing), and the weights."""

    name: str
    title: str
    clean: Callable[[], Pixels]
    task: str
    weights: str
    says: str
    seed: int = 0


def photo(name: str, top: int, left: int, side: int = SIDE) -> Callable[[], Pixels]:
    """A square of a photo of scikit-image."""
    return lambda: np.ascontiguousarray(getattr(skimage.data, name)()[top : top + side, left : left + side, :3])


def sign() -> Pixels:
    """A drawn sign with lines of shrinking text."""
    image = Image.new("RGB", (SIDE, SIDE), (240, 234, 214))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, SIDE - 11, SIDE - 11), outline=(120, 30, 30), width=5)
    y = 26
    for size in (40, 28, 20, 15, 11, 8):
        draw.text((24, y), "Serpent 1234567890", fill=(30, 30, 60), font=ImageFont.load_default(size=size))
        y += int(size * 1.4) + 6
    return np.asarray(image)


def weave() -> Pixels:
    """A drawn weave of threads two pixels wide, in saturated violet and black."""
    y, x = np.mgrid[:SIDE, :SIDE]
    over = ((x // 2 + y // 2) % 2).astype(bool)
    shade = 0.75 + 0.25 * np.sin(x / 40) * np.cos(y / 55)
    colours = np.where(over[..., None], (150, 20, 190), (40, 0, 60))
    return np.rint(colours * shade[..., None]).astype(np.uint8)


SCENES = (
    Scene("portrait", "A portrait with the damage of a camera", photo("astronaut", 20, 130), "photo", "serpent_l.photo",
          "A NASA portrait, public domain.", 3),
    Scene("cat", "A cat, noisy in dim light", photo("chelsea", 20, 110), "real", "serpent_l.photo",
          "Chelsea, by Stefan van der Walt, CC0.", 5),
    Scene("coffee", "A cup with mild damage: almost nothing changes", photo("coffee", 60, 180), "photo",
          "serpent_l.photo", "Coffee, by Pikolo Espresso Bar and Rachel Michetti, CC0.", 4),
    Scene("deblur", "The paper's blur of 3 px with noise of 5 %", photo("astronaut", 20, 130), "deblur",
          "serpent_l.deblur", "The weights that were made for just this."),
    Scene("sr8", "8 times the size", photo("astronaut", 0, 110, 256), "sr8", "serpent_l.sr8",
          "Left is the small image, enlarged by bicubic interpolation."),
    Scene("sr4", "4 times the size of a clean small image", photo("astronaut", 0, 110, 256), "sr4", "serpent_l.sr4",
          "Left is the small image, enlarged by bicubic interpolation."),
    Scene("sign", "Drawn text: the smallest lines stay lost", sign, "deblur", "serpent_l.deblur",
          "Strokes that the blur has merged come back as other strokes. Don't read numbers from a restored image."),
    Scene("untouched", "Nothing is wrong, and it should stay so", photo("chelsea", 20, 110), "", "serpent_l.photo",
          "A good photo should come back as it is."),
    Scene("weave", "A failure to look for: a fine regular pattern", weave, "", "serpent_l.photo",
          "The card of these weights says that they may take fine regular texture for noise. This drawing has threads "
          "of 2 px."),
    Scene("wrong_weights", "A failure: the wrong weights", photo("chelsea", 20, 110), "", "serpent_l.deblur",
          "A good photo through `deblur`, which expects a blur of 3 px: it sharpens what is sharp."),
)  # fmt: skip


def contact_sheet(side: int = 192, columns: int = 6) -> Image.Image:
    """A portrait as `serpent degrade --task real` makes it with the seeds 0 to 11, row by row."""
    clean = to_tensor(photo("astronaut", 20, 130, side)())
    sheet = Image.new("RGB", (columns * side, 2 * side))
    for seed in range(2 * columns):
        y = create_degradation("real")(clean, generator=evaluation_generator(seed, 0))
        row, column = divmod(seed, columns)
        pixels = y[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (column * side, row * side))
    return sheet


def main() -> None:
    contact_sheet().save(DOCS / "real.jpg", quality=80, subsampling="4:4:4", optimize=True)
    folder = DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    networks = {name: Restorer(name, device="cpu") for name in sorted({scene.weights for scene in SCENES})}
    day = datetime.datetime.now(datetime.UTC).date()
    lines = [
        "# Gallery",
        "",
        "Each row shows the input, the restored image, and the clean one with their PSNR. The photos are",
    ]
    lines += ["those that scikit-image ships, under free licences; the script makes the drawings. The pictures are"]
    lines += [
        "chosen to show what the weights do, not to measure them: [Weights](models.md) has figures of whole sets. The"
    ]
    lines += ["last rows are there as failures.", ""]
    for scene in SCENES:
        sheet, before, after = made(scene, networks[scene.weights])
        sheet.save(folder / f"{scene.name}.jpg", quality=80, subsampling="4:4:4", optimize=True)
        what = f"`serpent degrade --task {scene.task} --seed {scene.seed}`" if scene.task else "nothing"
        lines += [f"## {scene.title}", "", f"![Input, restored, clean](gallery/{scene.name}.jpg)", ""]
        lines += [
            f"{scene.says} Done to it: {what}. Weights: `{scene.weights}`. PSNR: {before} dB before, {after} after.",
            "",
        ]
        print(scene.name, before, after)
    lines += ["## Which weights", "", f"`make gallery` made these pictures on {day}, on a CPU, with these files:", ""]
    lines += ["| weights | SHA-256 |", "| --- | --- |"]
    for name in networks:
        digest = hashlib.sha256((WEIGHTS_DIR / f"{name}.safetensors").read_bytes()).hexdigest()
        lines.append(f"| `{name}` | `{digest[:16]}...` |")
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n")


def made(scene: Scene, restorer: Restorer) -> tuple[Image.Image, str, str]:
    """The sheet of a scene, and the PSNR of the input and of the restored image in words."""
    clean = scene.clean()
    whole = to_tensor(clean)
    given = whole
    if scene.task:
        given = create_degradation(scene.task)(whole, generator=evaluation_generator(scene.seed, 0))
    given8 = given.clamp(0, 1).mul(255).round().to(torch.uint8)
    restored = restorer(given8)
    shown = given8
    if given8.shape != whole.shape:
        enlarged = torch.nn.functional.interpolate(given8 / 255, whole.shape[-2:], mode="bicubic", align_corners=False)
        shown = enlarged.clamp(0, 1).mul(255).round().to(torch.uint8)
    before, after = decibels(shown, whole), decibels(restored, whole)
    captions = (f"Input, {before} dB", f"Restored, {after} dB", "Clean")
    sheet = Image.new("RGB", (3 * SIDE + 2 * MARGIN, SIDE + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (caption, image) in enumerate(zip(captions, (shown, restored, whole * 255), strict=True)):
        left = column * (SIDE + MARGIN)
        pixels = image[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (left, CAPTION))
        draw.text((left + SIDE // 2, CAPTION // 2), caption, "black", ImageFont.load_default(size=15), anchor="mm")
    return sheet, before, after


def decibels(image: torch.Tensor, clean: torch.Tensor) -> str:
    """PSNR of an uint8 image (1, 3, H, W), in words."""
    value = psnr(image / 255, clean).item()
    return "infinite" if value == float("inf") else f"{value:.1f}"


if __name__ == "__main__":
    main()
