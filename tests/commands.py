"""Calls of the command line, and small files for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from serpent_ir import cli, create_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the tests share few cores


def untrained_weights(folder: Path) -> dict[str, Path]:
    """Untrained weights of serpent_b by task; "bare" says neither task nor network."""
    torch.manual_seed(0)
    state = create_model("serpent_b").state_dict()
    for task in ("deblur", "sr8"):
        save_file(state, folder / f"{task}.safetensors", metadata={"network": "serpent_b", "task": task})
    save_file(state, folder / "bare.safetensors")
    return {task: folder / f"{task}.safetensors" for task in ("deblur", "sr8", "bare")}


def save_photo(path: Path, height: int, width: int, channels: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_recipe(path: Path, images: Path, out: Path) -> None:
    recipe = {"model": "serpent_b", "task": "deblur", "train": [str(images)], "val": str(images), "out": str(out)}
    path.write_text(json.dumps({**recipe, "stages": [{"crop": 8, "batch": 2, "steps": 9}], "device": "cpu"}))


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def size_of(path: Path) -> tuple[int, int]:
    return pixels_of(path).shape[1::-1]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def serpent(*args: object, input: bytes | None = None) -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="serpent", input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(
    *args: object, stdout: IO[str] | int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serpent_ir.cli", *map(str, args)]
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=300)
