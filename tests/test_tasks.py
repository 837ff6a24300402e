"""The tasks beyond the paper's, from a recipe to weights, an evaluation and the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import serpent_ir
from serpent_ir.degradations import DEGRADATIONS, create_degradation
from serpent_ir.evaluate import evaluate_network
from serpent_ir.models import TASK_CHANNELS, list_models

RECIPES = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(data.astronaut()[70 * i : 70 * i + 64, 150:214]).save(folder / f"{i}.png")
    return folder


def test_networks_take_the_channels_of_their_task():
    for task, degradation in DEGRADATIONS.items():
        assert TASK_CHANNELS.get(task, 3) == degradation.channels
        for network in list_models("serpent_*"):
            with torch.device("meta"):
                model = serpent_ir.create_model(f"{network}.{task}")
                assert model(torch.empty(1, degradation.channels, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("task", ["denoise", "jpeg", "inpaint", "photo"])
def test_a_recipe_trains_and_evaluates(task, photos, tmp_path):
    from serpent_ir.cli import train

    overrides = [f"train=[{photos}]", f"val={photos}", f"out={tmp_path / 'run'}", "device=cpu", "model=serpent_b"]
    overrides.append("stages=[{crop: 32, batch: 2, steps: 2}]")
    train(RECIPES / f"serpent_l.{task}.yaml", overrides)
    weights = tmp_path / "run" / "weights.safetensors"
    model = serpent_ir.create_model("serpent_b", checkpoint_path=weights)
    assert model.config.task == task
    result = evaluate_network(model, sorted(photos.iterdir()), task)
    assert result["n"] == 6
    assert all(math.isfinite(result[key]) for key in ("psnr", "ssim", "input_psnr", "input_ssim"))


def test_an_untouched_photo_does_not_make_the_mean_infinite(photos, monkeypatch):
    clean = create_degradation("deblur").__class__("clean", operator=torch.clone, sigma=0.0)
    monkeypatch.setitem(DEGRADATIONS, "clean", clean)
    files = sorted(photos.iterdir())
    assert evaluate_network(torch.nn.Conv2d(3, 3, 1), files, "clean")["input_psnr"] == math.inf  # there are no others
    seen = []

    def one_untouched(image):
        seen.append(image)
        return image if len(seen) == 2 else image * 0.9

    monkeypatch.setitem(DEGRADATIONS, "clean", clean.__class__("clean", operator=one_untouched, sigma=0.0))
    result = evaluate_network(torch.nn.Conv2d(3, 3, 1), files, "clean")
    assert result["images"][1]["input_psnr"] == math.inf
    others = [row["input_psnr"] for i, row in enumerate(result["images"]) if i != 1]
    assert result["input_psnr"] == pytest.approx(np.mean(others))
    json.dumps(result["input_psnr"], allow_nan=False)
