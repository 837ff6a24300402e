"""Figures of weights on the field's benchmarks, by their protocols, beside published ones.

    python tools/benchmark_figures.py WEIGHTS NETWORK.TASK --data ../shared/data/natural/val -o FILE.json

For `sr2` and `sr4`: Set5 and Set14 by the protocol `sr`. For `denoise`: CBSD68, Kodak24 (in its cropped form) and
McMaster at 15, 25 and 50 of 255, noise in float and not clipped, by the protocol `denoise` (`serpent_ir.metrics`).
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.data import read_rgb8
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.inference import pick_device
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import psnr
from serpent_ir.models import create_model

SIGMAS = (15, 25, 50)
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
            restored = run_network(network, imresize_down(clean, scale))
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
                restored = run_network(network, clean + sigma / 255 * noise).cpu()
                found.setdefault(f"{name}, {sigma}", {})[file.stem] = psnr(restored, clean, "denoise").item()
    return found


def told(figures: dict[str, Any]) -> str:
    """The figures as a section of the card."""
    task = figures["task"]
    if task == "denoise":
        how = "RGB, noise in float and not clipped, the result rounded to 8 bits. Kodak24 is its cropped form."
    else:
        how = f"Y of YCbCr, a border of {task[2:]} pixels left out."
    lines = [f"\n## On benchmarks\n\n{how} Mean PSNR in dB, beside what the papers print.\n"]
    lines += ["| images | n | these weights | published |", "| --- | --- | --- | --- |"]
    for name, row in figures["sets"].items():
        published = ", ".join(f"{of} {value:.2f}" for of, value in PUBLISHED[task].get(name, {}).items())
        lines.append(f"| {name} | {row['n']} | {row['psnr']:.2f} | {published} |")
    return "\n".join(lines) + "\n"


def summary(task: str, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"task": task, "sets": {name: {"n": len(r), "psnr": mean(r.values())} for name, r in found.items()}}


def _read(file: Path) -> Tensor:
    return read_rgb8(file)[None].float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("name", help="network and task, as serpent_l.sr4")
    parser.add_argument("--data", type=Path, required=True, help="folder with set5_*, set14_*, bsds_* and so on")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    network, _, task = args.name.partition(".")
    model = create_model(network, checkpoint_path=args.weights).to(pick_device("auto"))
    found = denoised(model, args.data) if task == "denoise" else enlarged(model, args.data, int(task[2:]))
    args.out.write_text(json.dumps(summary(task, found), indent=1) + "\n")
    print(told(summary(task, found)))


if __name__ == "__main__":
    main()
