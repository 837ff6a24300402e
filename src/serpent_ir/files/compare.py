"""Before and after side by side, with a detail enlarged, and how close both are to a reference."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from serpent_ir.errors import ImageError
from serpent_ir.image import Picture, read_image_pixels, to_pixels, to_tensor, write_image
from serpent_ir.metrics import SSIM_WINDOW, psnr, ssim

PANEL = 768
"""Longest side in pixels of an image on the sheet. Larger ones are shrunk."""
DETAIL = 5
"""The sides of the detail are the image's, divided by this."""
_MARGIN, _CAPTION = 12, 36


def write_comparison(before: Path, after: Path, sheet: Path, reference: Path | None = None) -> dict[str, float]:
    """Draw an image before and after its restoration side by side, and measure both files against a reference.

    Args:
        before: the file that was restored. It is enlarged (bicubic) if the restored one is larger.
        after: the restored file.
        sheet: where to write the drawing; the suffix decides the format.
        reference: what the restored file should look like. It is drawn too.

    Returns:
        input_psnr, psnr (dB), input_ssim and ssim, if there is a reference; SSIM only from 11 px per side on.

    Raises:
        ImageError: a file cannot be read or written, or the reference has another size.
    """
    restored = _read(after)
    given = _read(before)
    if given.shape != restored.shape:
        given = F.interpolate(given, restored.shape[-2:], mode="bicubic", align_corners=False)
    panels = {"Before": given, "After": restored}
    figures: dict[str, float] = {}
    if reference is not None:
        clean = _read(reference)
        if clean.shape != restored.shape:
            sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (clean, restored)]
            raise ImageError(f"{reference}: is {sizes[0]} px and the restored image {sizes[1]}; they must be the same")
        small = min(clean.shape[-2:]) < SSIM_WINDOW
        for prefix, image in (("input_", given), ("", restored)):
            figures[f"{prefix}psnr"] = psnr(image, clean).item()
            if not small:
                figures[f"{prefix}ssim"] = ssim(image, clean).item()
        panels = {
            f"Before, {figures['input_psnr']:.2f} dB": given,
            f"After, {figures['psnr']:.2f} dB": restored,
            "Reference": clean,
        }
    drawing = draw_panels({caption: _image(x) for caption, x in panels.items()}, find_detail(restored))
    write_image(sheet, Picture(np.asarray(drawing)))
    return figures


def find_detail(image: Tensor) -> tuple[int, int, int, int]:
    """The part of an image (1, 3, H, W) with the most edges, a fifth of its sides: left, top, right and bottom."""
    height, width = image.shape[-2:]
    tall, wide = max(1, height // DETAIL), max(1, width // DETAIL)
    grey = image.mean(1, keepdim=True)
    edges = torch.zeros_like(grey)
    edges[..., 1:, :] += grey.diff(dim=-2).abs()
    edges[..., 1:] += grey.diff(dim=-1).abs()
    stride = max(1, tall // 4), max(1, wide // 4)
    there = F.avg_pool2d(edges, (tall, wide), stride)[0, 0]
    row, column = divmod(int(there.argmax()), there.shape[1])
    top, left = row * stride[0], column * stride[1]
    return left, top, left + wide, top + tall


def draw_panels(panels: dict[str, Image.Image], detail: tuple[int, int, int, int]) -> Image.Image:
    """The captioned images, all of one size, in a row.

    Below each is its detail, as large as column and `PANEL` allow.
    """
    width, height = next(iter(panels.values())).size
    shrunk = min(1.0, PANEL / max(width, height))
    shown = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    column = max(shown[0], 256)  # room for a caption
    times = min(column / (detail[2] - detail[0]), PANEL / (detail[3] - detail[1]))  # so that narrow details also fit
    enlarged = max(1, round(times * (detail[2] - detail[0]))), max(1, round(times * (detail[3] - detail[1])))
    sheet = Image.new(
        "RGB", (_MARGIN + len(panels) * (column + _MARGIN), _CAPTION + shown[1] + enlarged[1] + 2 * _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=20)
    for place, (caption, image) in enumerate(panels.items()):
        x = _MARGIN + place * (column + _MARGIN)
        draw.text((x + column // 2, _CAPTION // 2), caption, fill="black", font=font, anchor="mm")
        sheet.paste(image if image.size == shown else image.resize(shown, Image.Resampling.LANCZOS), (x, _CAPTION))
        box = [math.floor(edge * shrunk) for edge in detail]
        draw.rectangle((x + box[0], _CAPTION + box[1], x + box[2], _CAPTION + box[3]), outline="white", width=2)
        # Nearest neighbour, so that the pixels of the files are seen as they are.
        close = image.crop(detail).resize(enlarged, Image.Resampling.NEAREST)
        sheet.paste(close, (x, _CAPTION + shown[1] + _MARGIN))
    return sheet


def _read(path: Path) -> Tensor:
    return to_tensor(read_image_pixels(path))


def _image(x: Tensor) -> Image.Image:
    return Image.fromarray(to_pixels(x, np.uint8))
