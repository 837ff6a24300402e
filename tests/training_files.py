"""A few drawn images, recipes that train tiny networks on them, and what such a run leaves."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from serpent_ir.train import Trainer
from serpent_ir.training.recipe import load_recipe

TINY = {"dim": 8, "blocks": [1, 1]}


def draw_image(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with a few hard edges."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=g)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    image[..., height // 3 : height // 2, width // 4 :] = torch.rand(1, 3, 1, 1, generator=g)
    return Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy())


def draw_folders(root: Path) -> Path:
    """Folders `train` (5 images of different sizes, one in a subfolder) and `val` (2)."""
    for name, sizes in {
        "train": [(48, 48), (48, 40), (48, 48), (40, 48), (48, 48)],
        "val": [(48, 40), (33, 57)],
    }.items():
        (root / name / "sub").mkdir(parents=True)
        for i, size in enumerate(sizes):
            draw_image(*size, seed=i).save(root / name / ("sub" if i == 1 else "") / f"{i}.png")
    return root


def recipe_file(root: Path, out: str = "run", **changes) -> Path:
    """A recipe of 10 steps in two stages with a tiny network, in a file named after its run."""
    recipe = {
        "model": "serpent_b",
        "task": "deblur",
        "train": [str(root / "train")],
        "val": str(root / "val"),
        "out": str(root / out),
        "stages": [{"crop": 16, "batch": 4, "steps": 6}, {"crop": 32, "batch": 4, "steps": 4}],
        "warmup": 2,
        "val_every": 4,
        "device": "cpu",
        "model_options": TINY,
    }
    file = root / f"{out}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


def quiet_trainer(file: Path, *overrides: str, **options: Any) -> Trainer:
    """The trainer of a recipe, which says nothing."""
    return Trainer(load_recipe(file, overrides), say=lambda line: None, **options)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def logged(run: Path) -> list[int]:
    """The steps of a log's rows."""
    return [row["step"] for row in rows_of(run)]
