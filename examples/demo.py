"""Degrade a free sample photo, restore it with the weights that ship, and show both beside the clean one.

    make demo        (or: python examples/demo.py [FOLDER])

Writes clean.png, degraded.png, restored.png and side-by-side.png into FOLDER (default: demo).
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from skimage import data

from serpent_ir.cli import degrade, restore
from serpent_ir.errors import SerpentError
from serpent_ir.image import read_image, to_tensor
from serpent_ir.metrics import psnr

WEIGHTS = "serpent_l.deblur"  # they undo what `degrade` does here; for everyday photos there is serpent_l.photo
DETAIL = (160, 60, 288, 188)  # left, top, right, bottom of the face
MARGIN, CAPTION = 12, 40


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clean, degraded, restored = (folder / f"{name}.png" for name in ("clean", "degraded", "restored"))
    Image.fromarray(data.astronaut()).save(clean)  # NASA's portrait of Eileen Collins, public domain
    degrade([clean], degraded, task="deblur", seed=0)
    restore([degraded], restored, name=WEIGHTS)

    reference = to_tensor(read_image(clean).pixels)
    before, after = (psnr(to_tensor(read_image(file).pixels), reference).item() for file in (degraded, restored))
    panels = {
        f"Input (blur and noise), {before:.2f} dB": degraded,
        f"Restored by {WEIGHTS}, {after:.2f} dB": restored,
        "Clean": clean,
    }
    sheet = folder / "side-by-side.png"
    side_by_side({caption: Image.open(file).convert("RGB") for caption, file in panels.items()}).save(sheet)
    print(f"PSNR before: {before:.2f} dB")
    print(f"PSNR after:  {after:.2f} dB")
    print(f"See {sheet}")


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """The captioned images in a row, and below each the detail, enlarged to the same width."""
    width, height = next(iter(panels.values())).size
    left, top, right, bottom = DETAIL
    enlarged = width // (right - left)
    detail_size = ((right - left) * enlarged, (bottom - top) * enlarged)
    sheet_size = (len(panels) * (width + MARGIN) + MARGIN, CAPTION + height + MARGIN + detail_size[1] + MARGIN)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=22)
    for column, (caption, image) in enumerate(panels.items()):
        x = MARGIN + column * (width + MARGIN)
        draw.text((x + width // 2, CAPTION // 2), caption, fill="black", font=font, anchor="mm")
        sheet.paste(image, (x, CAPTION))
        draw.rectangle((x + left, CAPTION + top, x + right, CAPTION + bottom), outline="white", width=2)
        # Nearest, so that the pixels of the files are seen as they are.
        detail = image.crop(DETAIL).resize(detail_size, Image.Resampling.NEAREST)
        sheet.paste(detail, (x, CAPTION + height + MARGIN))
    return sheet


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except (SerpentError, OSError) as error:
        sys.exit(f"demo: error: {error}")
