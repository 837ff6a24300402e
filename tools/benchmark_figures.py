"""Figures of weights on the field's benchmarks, by their protocols, beside published ones.

    python tools/benchmark_figures.py --data ../shared/data [NAME ...] [-o FILE.json]

For all weights that ship and have a benchmark, or those named; `--weights FILE` measures a file as NAME. The JSON file
(by default benchmarks/results/benchmarks.json) keeps the rows of other names, and `python benchmarks/render.py` sets
them into RESULTS.md.

- `sr2` and `sr4`: Set5 and Set14 by the protocol `sr` (`serpent_ir.metrics`).
- `denoise`: CBSD68, Kodak24 (in its cropped form) and McMaster at 15, 25 and 50 of 255, noise in float and not clipped,
  by the protocol `denoise`.
- `jpeg`: the 100 images of BSDS500's val, Kodak24 and Set14, written by libjpeg with chroma halved at quality 10, 20,
  30 and 40, by the protocol `jpeg`. LIVE1 and classic5, for which papers print figures, are not in the data.
- `photo`: what `tools/photo_bars.py` measures, as people get it, with `auto`.

Networks run in float32.
"""

import argparse
import io
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import photo_bars
import torch
from PIL import Image
from torch import Tensor, nn

from serpent_ir.data import read_rgb8
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.inference import pick_device
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import psnr
from serpent_ir.models import create_model, list_models
from serpent_ir.profiling.count import count
from serpent_ir.system.devices import device_name

FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "benchmarks.json"
SIGMAS = (15, 25, 50)
QUALITIES = (10, 20, 30, 40)
NOT_CBSD68 = "bsds_156065"  # CBSD68 is the first 69 of the 100 images by name, as text, without this one
PUBLISHED = {
    "sr4": {
        "Set5": {"bicubic": 28.42, "VDSR": 31.35, "CARN": 32.13, "SwinIR-light": 32.44},
        "Set14": {"bicubic": 26.00, "VDSR": 28.01, "CARN": 28.60, "SwinIR-light": 28.77},
    },
    "sr2": {
        "Set5": {"bicubic": 33.66, "VDSR": 37.53, "CARN": 37.76, "SwinIR-light": 38.14},
        "Set14": {"bicubic": 30.24, "VDSR": 33.03, "CARN": 33.52, "SwinIR-light": 33.86},
    },
    "denoise": {
        "CBSD68, 15": {"FFDNet": 33.87},
        "CBSD68, 25": {
            "DnCNN": 31.24,
            "FFDNet": 31.21,
            "DRUNet": 31.69,
            "SwinIR": 31.78,
            "Restormer": 31.79,
            "MambaIR": 31.80,
        },
        "CBSD68, 50": {"FFDNet": 27.96},
        "Kodak24, 15": {"FFDNet": 34.63},
        "Kodak24, 25": {"FFDNet": 32.13},
        "Kodak24, 50": {"FFDNet": 28.98},
        "McMaster, 15": {"FFDNet": 34.66},
        "McMaster, 25": {"FFDNet": 32.35},
        "McMaster, 50": {"FFDNet": 29.18},
    },
}
"""PSNR in dB as the papers print it."""


def enlarged(network: nn.Module, folder: Path, scale: int) -> dict[str, dict[str, float]]:
    """PSNR of Y by image, for Set5 and Set14."""
    found: dict[str, dict[str, float]] = {}
    for name in ("Set5", "Set14"):
        for file in sorted(folder.glob(f"{name.lower()}_*")):
            clean = _read(file)
            height, width = (side // scale * scale for side in clean.shape[-2:])
            clean = clean[..., :height, :width]
            restored = run_network(network, imresize_down(clean, scale), precision="float32")
            found.setdefault(name, {})[file.stem] = psnr(restored.cpu(), clean, "sr", scale=scale).item()
    return found


def denoised(network: nn.Module, folder: Path) -> dict[str, dict[str, float]]:
    """PSNR of RGB by image, for each set and strength. Noise is drawn by the number of the image in its set."""
    cbsd = [file for file in sorted(folder.glob("bsds_*"), key=lambda file: file.stem)[:69] if file.stem != NOT_CBSD68]
    sets = {"CBSD68": cbsd, "Kodak24": sorted(folder.glob("kodak24_*")), "McMaster": sorted(folder.glob("mcmaster_*"))}
    found: dict[str, dict[str, float]] = {}
    for name, files in sets.items():
        for sigma in SIGMAS:
            for number, file in enumerate(files):
                clean = _read(file)
                noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
                restored = run_network(network, clean + sigma / 255 * noise, precision="float32").cpu()
                found.setdefault(f"{name}, {sigma}", {})[file.stem] = psnr(restored, clean, "denoise").item()
    return found


def repaired(network: nn.Module, folder: Path) -> dict[str, dict[str, list[float]]]:
    """PSNR of Y before and after by image, for each set and quality of JPEG."""
    sets = {"BSDS100": "bsds_*", "Kodak24": "kodak24_*", "Set14": "set14_*"}
    found: dict[str, dict[str, list[float]]] = {}
    for name, pattern in sets.items():
        for quality in QUALITIES:
            for file in sorted(folder.glob(pattern)):
                clean = _read(file)
                given = _through_libjpeg(clean, quality)
                restored = run_network(network, given, precision="float32").cpu()
                pair = [psnr(image, clean, "jpeg").item() for image in (given, restored)]
                found.setdefault(f"{name}, {quality}", {})[file.stem] = pair
    return found


def _through_libjpeg(clean: Tensor, quality: int) -> Tensor:
    data = io.BytesIO()
    pixels = clean[0].mul(255).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(data) as image:
        return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float() / 255


def figures(task: str, network: nn.Module, data: Path) -> dict[str, Any]:
    """The figures of a network: `sets` by name, each with n, psnr and, where it means something, input_psnr."""
    folder = data / "natural" / "val"
    sets: dict[str, Any] = {}
    if task == "photo":
        for name, bar in photo_bars.measure(network, data).items():
            keys = ("n", "same", "input_psnr", "psnr", "gain", "least_gain", "worst", "under_42", "worse_by_0.1")
            sets[name] = {key: bar[key] for key in keys if key in bar and math.isfinite(bar[key])}
    elif task == "jpeg":
        for name, rows in repaired(network, folder).items():
            before, after = zip(*rows.values(), strict=True)
            sets[name] = {"n": len(rows), "input_psnr": mean(before), "psnr": mean(after)}
    else:
        found = denoised(network, folder) if task == "denoise" else enlarged(network, folder, int(task[2:]))
        sets = {name: {"n": len(rows), "psnr": mean(rows.values())} for name, rows in found.items()}
    return {"task": task, "sets": sets}


def cost(network: nn.Module) -> dict[str, float]:
    """Parameters (M), and multiply-accumulates (G) for a picture of 1280x720 pixels."""
    scale = getattr(network, "scale", 1)
    counts = count(network.to("meta"), 720 // scale, 1280 // scale)
    return {"parameters": counts.params / 1e6, "gmacs": counts.macs / 1e9}


HOW = {
    "denoise": "RGB, noise in float and not clipped, the result rounded to 8 bits. Kodak24 is its cropped form.",
    "jpeg": "Y of YCbCr, written by libjpeg with chroma halved. LIVE1 and classic5, which papers use, were not there.",
    "sr2": "Y of YCbCr, a border of 2 pixels left out.",
    "sr4": "Y of YCbCr, a border of 4 pixels left out.",
}


def told(found: dict[str, Any]) -> str:
    """The figures as a section of the card. Those of `photo` have one of their own (`photo_bars`)."""
    task = found["task"]
    lines = [f"\n## On benchmarks\n\n{HOW[task]} Mean PSNR in dB, beside what the papers print.\n"]
    return "\n".join([*lines, *rows_of(found)]) + "\n"


def rows_of(found: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table."""
    given = any("input_psnr" in row for row in found["sets"].values())
    lines = [f"| images | n |{' input |' if given else ''} these weights | published |"]
    lines += ["| --- | --- |" + " --- |" * (2 + given)]
    for name, row in found["sets"].items():
        published = ", ".join(
            f"{of} {value:.2f}" for of, value in PUBLISHED.get(found["task"], {}).get(name, {}).items()
        )
        before = f" {row['input_psnr']:.2f} |" if given else ""
        lines.append(f"| {name} | {row['n']} |{before} {row['psnr']:.2f} | {published or '-'} |")
    return lines


def _read(file: Path) -> Tensor:
    return read_rgb8(file)[None].float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="network and task, as serpent_l.sr4")
    parser.add_argument("--data", type=Path, required=True, help="folder with natural, free and real_noise")
    parser.add_argument("--weights", type=Path, help="a file to measure as the one NAME")
    parser.add_argument("-o", "--out", type=Path, default=FILE)
    args = parser.parse_args()
    if args.weights and len(args.names) != 1:
        parser.error("--weights takes one NAME")
    names = args.names or [n for n in list_models(pretrained=True) if n.partition(".")[2] in HOW | {"photo": ""}]
    rows = json.loads(args.out.read_text()) if args.out.exists() else {}
    device = pick_device("auto")
    for name in names:
        network, _, task = name.partition(".")
        model = (
            create_model(network, checkpoint_path=args.weights) if args.weights else create_model(name, pretrained=True)
        )
        found = figures(task, model.to(device), args.data)
        rows[name] = {**found, **cost(model), "device": device_name(device)}
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, *rows_of(found), sep="\n")


if __name__ == "__main__":
    main()
