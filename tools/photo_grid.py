"""How the blind weights `photo` perform at given strengths (an evaluation of the task draws them), for their card."""

import itertools
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.data import read_rgb8
from serpent_ir.degradations import add_noise, evaluation_generator
from serpent_ir.degradations.blur import blur_each
from serpent_ir.degradations.jpeg import through_jpeg
from serpent_ir.image.folders import find_images
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import eight_bits, psnr

BLURS, NOISES, QUALITIES = (0, 1, 2, 3), (0.0, 0.03, 0.06), (None, 75, 30)
EVERY = 12  # step through the folder's images; undegraded ones are all measured
UNDEGRADED = (0, 0.0, None)
SMALL = 0.05  # dB: a smaller difference is neither better nor worse

TEXT = """
## At which strengths

Every {every}th image of {data} ({n} images) with the blur, the noise and then the JPEG of each cell, rounded to 8 bits:
input PSNR → PSNR, means in dB. {worse} of {cells} cells got worse. In brackets: how many
of the {n} images did, by more than 0.05 dB.

| blur (px), noise | no JPEG | JPEG 75 | JPEG 30 |
| --- | --- | --- | --- |
{rows}

**A good photo**: all {all} images of {data}, undegraded, come back at {undegraded:.1f} dB on average; the worst
(`{worst_file}`) at {worst:.1f} dB; {under} of them under 38 dB.
"""


def measure(network: nn.Module, folder: Path, kept: Path) -> dict[str, Any]:
    """Cells of PSNR (dB) for blur (px) x noise ([0, 1] scale) x JPEG quality, and all images undegraded.

    Finished images are recorded in the file `kept`, one per line, from which an interrupted measurement continues. An
    infinite PSNR (identical images) is None, and is left out of means.
    """
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done: dict[tuple[Any, ...], list[float | None]] = {tuple(line[:4]): line[4:] for line in lines}
    files = find_images(folder)

    def cell(blur: float, noise: float, quality: int | None, every: int) -> list[list[float | None]]:
        keys = [(blur, noise, quality, str(file.relative_to(folder))) for file in files[::every]]
        for index, key in enumerate(keys):
            if key not in done:
                clean = read_rgb8(folder / key[3])[None].float() / 255
                given = damaged(clean, blur, noise, quality, evaluation_generator(0, index))
                pair = (
                    psnr(given, clean).item(),
                    psnr(run_network(network, given, precision="float32").cpu(), clean).item(),
                )
                done[key] = [p if math.isfinite(p) else None for p in pair]
                with kept.open("a") as out:
                    out.write(json.dumps([*key, *done[key]]) + "\n")
        return [done[key] for key in keys]

    cells = [
        {"blur": b, "noise": n, "jpeg": q, **_summary(cell(b, n, q, EVERY))}
        for b, n, q in itertools.product(BLURS, NOISES, QUALITIES)
    ]
    restored = [p for _, p in cell(*UNDEGRADED, every=1)]
    finite = [p for p in restored if p is not None]
    worst = restored.index(min(finite))
    undegraded = {"n": len(files), "psnr": mean(finite), "worst": min(finite), "worst_image": files[worst].name}
    undegraded["under_38"] = sum(p < 38 for p in finite)
    return {"data": "/".join(folder.parts[-2:]), "every": EVERY, "cells": cells, "undegraded": undegraded}


def damaged(x: Tensor, blur: float, noise: float, quality: int | None, generator: torch.Generator) -> Tensor:
    """The chain of `photo` at given strengths, in 8 bits, as a file would hold it."""
    x = blur_each(x, torch.tensor([float(blur)])) if blur else x
    x = add_noise(x, noise, generator) if noise else x
    return through_jpeg(x, torch.tensor([quality])) if quality else eight_bits(x)


def _summary(images: list[list[float | None]]) -> dict[str, Any]:
    """Means of pairs (input, restored), and the number of images that got worse."""
    given, restored = ([p for p in column if p is not None] for column in zip(*images, strict=True))
    worse = sum((b or math.inf) < (a or math.inf) - SMALL for a, b in images) if given else 0
    input_psnr = mean(given) if given else None
    return {"n": len(images), "input_psnr": input_psnr, "psnr": mean(restored), "worse": worse}


def told(grid: dict[str, Any]) -> str:
    """The grid as a section of the card."""
    cells, undegraded = grid["cells"], grid["undegraded"]
    rows = [
        f"| {blur}, {noise:g} | {' | '.join(_cell(c) for c in cells if (c['blur'], c['noise']) == (blur, noise))} |"
        for blur, noise in itertools.product(BLURS, NOISES)
    ]
    return TEXT.format(
        rows="\n".join(rows),
        cells=len(cells) - 1,  # undegraded images cannot get better
        worse=sum(_got_worse(cell) for cell in cells),
        every=EVERY,
        data=grid["data"],
        n=cells[0]["n"],
        all=undegraded["n"],
        undegraded=undegraded["psnr"],
        worst=undegraded["worst"],
        worst_file=undegraded["worst_image"],
        under=undegraded["under_38"],
    )


def _got_worse(cell: dict[str, Any]) -> bool:
    return cell["input_psnr"] is not None and cell["psnr"] < cell["input_psnr"]


def _cell(cell: dict[str, Any]) -> str:
    if cell["input_psnr"] is None:
        return f"undegraded → {cell['psnr']:.1f}"
    figures = f"{cell['input_psnr']:.2f} → {cell['psnr']:.2f}"
    if _got_worse(cell):
        return f"**{figures}: worse** ({cell['worse']})"
    return f"{figures} ({cell['worse']})" if cell["worse"] else figures
