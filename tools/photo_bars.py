"""What `photo` weights must achieve on photographs, besides the grid of strengths: real noise, good photos, JPEG,
tiles. Each image is measured as the network gives it, and after `auto`, which people get by default.

    python tools/photo_bars.py WEIGHTS --data ../shared/data [--every 12] -o FILE.json

The folder must hold natural/val, free/val and real_noise. --every N takes every Nth image of the first two.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from photo_grid import damaged
from torch import Tensor, nn

from serpent_ir.data import read_rgb8
from serpent_ir.degradations import evaluation_generator
from serpent_ir.image.folders import find_images
from serpent_ir.inference import Restorer
from serpent_ir.inference.blending import Blend, blended
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import psnr
from serpent_ir.models import create_model

TILE, TILED_EVERY = 256, 12
NOTES = """\
real_noise: crops of the PolyU set, JPEGs of five cameras with the mean of many shots as truth. Tiles: undegraded
images, whole (as the input) and in tiles of 256 px. An image that comes back to the last bit counts in no mean."""
AUTO = " with auto"
"""What the names of bars end in whose images went through `auto`."""


def measure(network: nn.Module, data: Path, every: int = 1, names: Sequence[str] = ()) -> dict[str, Any]:
    """PSNR (dB) by name of a bar, for all bars or those in `names`.

    `images` holds each image's PSNR and that of its input, None if infinite; there are also means. Each bar has a
    second one, with `AUTO` in its name.
    """
    natural, free = (find_images(data / name / "val")[::every] for name in ("natural", "free"))
    noisy = find_images(data / "real_noise" / "noisy")

    def restored(given: Tensor) -> Tensor:
        return run_network(network, given, precision="float32").cpu()

    def pairs(files: list[Path], damage: Callable[[Tensor, int], Tensor]) -> Iterator[dict[str, Any]]:
        for index, file in enumerate(files):
            clean = _read(file)
            given = damage(clean, index)
            yield {"file": file.name, **_compared(given, *both(given), clean)}

    def both(given: Tensor) -> tuple[Tensor, Tensor]:
        made = restored(given)
        judged = blended([made.clamp(0, 1)], lambda rows: given[:, :, slice(*rows)], given.shape[2], Blend(judged=True))
        return made, torch.cat(list(judged), 2)

    def real() -> Iterator[dict[str, Any]]:
        for file in noisy:
            given, clean = _read(file), _read(data / "real_noise" / "mean" / file.name)
            yield {"file": file.name, **_compared(given, *both(given), clean)}

    def tiled() -> Iterator[dict[str, Any]]:
        device = str(next(network.parameters()).device)
        plain, judged = (
            [Restorer(network, device=device, precision="float32", tile=tile, auto=auto) for tile in ("none", TILE)]
            for auto in (False, True)
        )
        for file in find_images(data / "natural" / "val")[::TILED_EVERY]:
            clean = _read(file)
            if max(clean.shape[-2:]) > TILE:
                found = [_finite(psnr(restorer(clean).cpu(), clean)) for restorer in (*plain, *judged)]
                names = ("input_psnr", "psnr", "auto_input", "auto")
                yield {"file": file.name, **dict(zip(names, found, strict=True))}

    def jpeg(clean: Tensor, index: int) -> Tensor:
        return damaged(clean, 0, 0, 75, evaluation_generator(0, index))

    rows = {
        "real_noise": real(),
        "natural/val": pairs(natural, lambda clean, _: clean),
        "free/val": pairs(free, lambda clean, _: clean),
        "natural/val, JPEG 75": pairs(natural, jpeg),
        "tiles against whole": tiled(),
    }
    found = {name: list(rows[name]) for name in names or rows}
    bars: dict[str, Any] = {}
    for name, rows_of in found.items():
        judged = [
            {**row, "psnr": row["auto"], "input_psnr": row.get("auto_input", row["input_psnr"])} for row in rows_of
        ]
        for label, images in ((name, rows_of), (name + AUTO, judged)):
            images = [{key: row[key] for key in ("file", "input_psnr", "psnr")} for row in images]
            bars |= {label: {**_summary(images), "images": images}} if images else {}
    return bars


def _read(file: Path) -> Tensor:
    return read_rgb8(file)[None].float() / 255


def _compared(given: Tensor, restored: Tensor, judged: Tensor, clean: Tensor) -> dict[str, float | None]:
    images = {"input_psnr": given, "psnr": restored, "auto": judged}
    return {name: _finite(psnr(image, clean)) for name, image in images.items()}


def _finite(value: Tensor) -> float | None:
    return value.item() if math.isfinite(value.item()) else None


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and the least of the results and of the gains. If the input is clean, there are no gains."""
    restored = [row["psnr"] for row in rows if row["psnr"] is not None]
    told: dict[str, Any] = {"n": len(rows), "same": len(rows) - len(restored)}
    told |= {"psnr": mean(restored), "worst": min(restored)} if restored else {"psnr": math.inf, "worst": math.inf}
    told["under_42"] = sum(value < 42 for value in restored)
    gains = [row["psnr"] - row["input_psnr"] for row in rows if None not in (row["psnr"], row["input_psnr"])]
    if gains:
        told["input_psnr"] = mean(row["input_psnr"] for row in rows if row["input_psnr"] is not None)
        told |= {"gain": mean(gains), "least_gain": min(gains), "better": sum(gain > 0 for gain in gains)}
        told |= {f"worse_by_{share}": sum(gain < -share for gain in gains) for share in (0.1, 0.3)}
    return told


def told(bars: dict[str, Any]) -> str:
    """The bars as a section of the card, with the images that became worst."""
    text = [
        "\n## On photographs\n",
        "| images | n | input PSNR | PSNR | gain | better | worse by 0.1 dB | by 0.3 dB | the worst |",
    ]
    text.append("| --- |" + " --- |" * 8)
    for name, bar in bars.items():
        gains = ("gain", "better", "worse_by_0.1", "worse_by_0.3")
        cells = (
            [f"{bar[key]:+.2f}" if key == "gain" else str(bar[key]) for key in gains] if "gain" in bar else ["-"] * 4
        )
        given = f"{bar['input_psnr']:.2f}" if "gain" in bar else "undegraded"
        worst = min(bar["images"], key=_change)
        known = "" if worst["input_psnr"] is None else f"{worst['input_psnr']:.2f} to "
        cells.append(f"`{worst['file'].partition('.')[0]}` {known}{worst['psnr']:.2f}")
        text.append(f"| {name} | {bar['n']} | {given} | {bar['psnr']:.2f} | {' | '.join(cells)} |")
    return "\n".join(text) + f"\n\n{NOTES}\n"


def _change(row: dict[str, Any]) -> float:
    if row["psnr"] is None:
        return math.inf
    return row["psnr"] - (row["input_psnr"] or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(create_model("serpent_l", checkpoint_path=args.weights).to(device), args.data, args.every)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, bar in found.items():
        print(name.ljust(22), {key: round(bar[key], 2) for key in bar if key != "images"})


if __name__ == "__main__":
    main()
