"""Fits the constants of `serpent_ir.inference.auto` to weights of `photo`, on training images alone.

    python tools/fit_auto.py WEIGHTS --data ../shared/data/natural/train ../shared/data/free/train -o FILE.json

A crop of each image is damaged in several ways and restored, and the constants are those with the least mean logarithm
of the squared error (plus `FLOOR`) over all pairs. Five-fold cross-validation, in which no image is in two folds, says
what each figure is worth: the same fit without it. No validation image is read. Those are for `tools/photo_bars.py`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir.data import list_images, read_rgb8
from serpent_ir.degradations import add_noise, blur_each, create_degradation, evaluation_generator
from serpent_ir.degradations.jpeg import through_jpeg
from serpent_ir.inference import auto, pick_device
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import eight_bits
from serpent_ir.models import create_model

SIDE = 256
FLOOR = 2e-5
"""Added to a mean squared error (47 dB), below which less hardly counts."""
IMPORTANT = {"clean": 3.0, "real": 3.0}
"""The weight of a kind of pair in the mean, where it is not 1."""
FOLDS = 5
NAMES = [field.name for field in fields(auto.Weights)][1:]


@dataclass(frozen=True)
class Pairs:
    """Damaged images with what a network made of them, by cells: of n images, k kinds of damage and c cells each.

    Attributes:
        kinds: names of the kinds.
        figures: (n, k, c, 6) of `auto.figures`.
        errors: (n, k, c, 3): means of the squared error of the damaged image, of its product with the network's change,
            and of the squared change. So a share s of the change leaves e + 2 s p + s^2 q.
    """

    kinds: list[str]
    figures: Tensor
    errors: Tensor

    def of(self, images: Tensor) -> "Pairs":
        return Pairs(self.kinds, self.figures[images], self.errors[images])


def damaged(x: Tensor, number: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (damaged, target) of an image (1, 3, H, W) by kind, in 8 bits. Everything random depends on `number`."""

    def draw(key: int) -> torch.Generator:
        return evaluation_generator(1000 + key, number)

    pairs = {"clean": (x, x), "blur": (blur_each(x, torch.tensor([0.8])), x)}
    pairs |= {f"jpeg{quality}": (through_jpeg(x, torch.tensor([quality])), x) for quality in (60, 75, 90, 95)}
    pairs |= {f"noise{sigma}": (add_noise(x, sigma / 255, draw(sigma)), x) for sigma in (2, 4, 8)}
    pairs |= {f"real{key}": create_degradation("real").pair(x, generator=draw(100 + key)) for key in range(4)}
    pairs["photo"] = create_degradation("photo").pair(x, generator=draw(200))
    return {kind: (eight_bits(given.float()), target) for kind, (given, target) in pairs.items()}


def pairs_of(network: nn.Module, files: Sequence[Any]) -> Pairs:
    """The pairs of a crop of each file. Every second one is halved, so that its chroma is as sharp as its luma."""
    device = next(network.parameters()).device
    kinds: list[str] = []
    figures, errors = [], []
    for number, file in enumerate(files):
        x = read_rgb8(file)[None].float() / 255
        if number % 2 and min(x.shape[-2:]) >= 2 * SIDE:
            x = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1).mul(255).round() / 255
        corner = np.random.default_rng(number).integers(0, np.array(x.shape[-2:]) // 2 - SIDE // 2 + 1) * 2
        x = x[..., corner[0] : corner[0] + SIDE, corner[1] : corner[1] + SIDE].contiguous().to(device)
        pairs = damaged(x, number)
        kinds = list(pairs)
        given, target = (torch.cat([pair[i] for pair in pairs.values()]) for i in (0, 1))
        made = run_network(network, given, precision="float32").clamp(0, 1)
        cells = auto.moments(given, made)
        change, error = made - given, given - target
        means = torch.stack([(error * error).mean(1), (error * change).mean(1), (change * change).mean(1)], 1)
        figures.append(auto.figures(cells).flatten(2).mT)
        errors.append(F.avg_pool2d(means, auto.CELL).flatten(2).mT)
    return Pairs(kinds, torch.stack(figures), torch.stack(errors).double())


def loss_of(pairs: Pairs, share: Tensor) -> Tensor:
    """The mean over pairs, for shares (n, k, c)."""
    error, product, change = pairs.errors.unbind(-1)
    left = (error + 2 * share * product + share**2 * change).mean(-1).clamp(min=0)
    weights = torch.tensor([IMPORTANT.get(kind.rstrip("0123456789"), 1.0) for kind in pairs.kinds]).to(left)
    return ((left + FLOOR).log10() * weights).sum() / (weights.sum() * len(left))


def share_of(pairs: Pairs, constants: Tensor, kept: Sequence[int]) -> Tensor:
    return torch.sigmoid(constants[0] + (pairs.figures[..., list(kept)].double() * constants[1:]).sum(-1))


def fitted(pairs: Pairs, kept: Sequence[int] = range(len(NAMES))) -> Tensor:
    """The bias and the weights of the figures `kept`, by L-BFGS on standardised figures."""
    chosen = pairs.figures[..., list(kept)].double()
    middle, spread = chosen.mean((0, 1, 2)), chosen.std((0, 1, 2)).clamp(min=1e-9)
    standard = Pairs(pairs.kinds, (chosen - middle) / spread, pairs.errors)
    constants = torch.zeros(len(kept) + 1, dtype=torch.float64, device=chosen.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([constants], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(standard, share_of(standard, constants, range(len(kept))))
        loss.backward()
        return loss

    optimizer.step(closure)
    slopes = constants.detach()[1:] / spread
    return torch.cat([constants.detach()[:1] - (slopes * middle).sum(), slopes])


def validated(pairs: Pairs, kept: Sequence[int]) -> float:
    """The loss on images that a fit did not see, by cross-validation."""
    folds = torch.arange(len(pairs.figures)) % FOLDS
    losses = []
    for fold in range(FOLDS):
        seen, unseen = pairs.of(folds != fold), pairs.of(folds == fold)
        losses.append(loss_of(unseen, share_of(unseen, fitted(seen, kept), kept)).item())
    return mean(losses)


def table(pairs: Pairs, share: Tensor) -> dict[str, dict[str, float]]:
    """PSNR (dB, means over images, of at most 80 each) by kind: of the input, of the network, and after the rule."""
    error, product, change = pairs.errors.unbind(-1)

    def decibels(s: Tensor) -> Tensor:
        left = (error + 2 * s * product + s**2 * change).mean(-1)
        return -10 * left.clamp(min=1e-8).log10()

    rows = {"input": torch.zeros_like(share), "network": torch.ones_like(share), "auto": share}
    values = {name: decibels(s) for name, s in rows.items()}
    found = {}
    for number, kind in enumerate(pairs.kinds):
        found[kind] = {name: value[:, number].mean().item() for name, value in values.items()}
        found[kind]["worst"] = values["auto"][:, number].min().item()
    return found


def fit(network: nn.Module, files: Sequence[Any]) -> dict[str, Any]:
    """The constants, and what shows what they are worth."""
    with torch.no_grad():
        pairs = pairs_of(network, files)
    constants = fitted(pairs)
    every = range(len(NAMES))
    losses = {"all figures": validated(pairs, every)}
    losses |= {f"without {NAMES[i]}": validated(pairs, [j for j in every if j != i]) for i in every}
    losses["the network alone"] = loss_of(pairs, torch.ones_like(pairs.errors[..., 0])).item()
    named = dict(zip(["bias", *NAMES], (round(value, 2) for value in constants.tolist()), strict=True))
    rounded = torch.tensor(list(named.values())).to(constants)
    return {
        "constants": named,
        "images": len(files),
        "pairs": len(files) * len(pairs.kinds),
        "cross-validated loss": losses,
        "training images": table(pairs, share_of(pairs, rounded, every)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="of photo")
    parser.add_argument("--network", default="serpent_l")
    parser.add_argument("--data", nargs="+", required=True, help="folders of training images")
    parser.add_argument("--every", type=int, default=1, help="take every Nth image")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    network = create_model(args.network, checkpoint_path=args.weights).to(pick_device("auto"))
    found = fit(network, [file for folder in args.data for file in list_images(folder)][:: args.every])
    args.out.write_text(json.dumps({**found, "weights": args.weights.name, "data": args.data}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
