"""Evaluation of networks on a few images that code draws."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from networks import small_network
from serpent_ir import create_model, restore
from serpent_ir.data import read_rgb8
from serpent_ir.degradations import create_degradation, evaluation_generator
from serpent_ir.errors import UsageError
from serpent_ir.evaluate import evaluate, evaluate_network, evaluate_without_truth
from serpent_ir.image.folders import find_images
from serpent_ir.metrics import Brisque
from training_files import draw_folders


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def test_evaluation_reports_means_and_repeats(folders):
    first = evaluate(folders / "val", "deblur", "serpent_b", weights=_random_weights(folders), device="cpu", seed=3)
    second = evaluate(folders / "val", "deblur", "serpent_b", weights=_random_weights(folders), device="cpu", seed=3)
    assert first == second
    assert {"model", "task", "n", "psnr", "ssim", "input_psnr", "input_ssim"} <= first.keys()
    assert first["n"] == 2
    assert math.isclose(first["psnr"], sum(row["psnr"] for row in first["images"]) / 2)
    with pytest.raises(UsageError, match="undoes deblur, not sr8"):
        evaluate(folders / "val", "sr8", "serpent_b", weights=_random_weights(folders), device="cpu")


def _random_weights(folders):
    torch.manual_seed(0)
    save_file(create_model("serpent_b").state_dict(), folders / "w.safetensors", {"task": "deblur"})
    return folders / "w.safetensors"


def test_evaluation_scores_an_identity_network_as_its_input(folders):
    network = torch.nn.Conv2d(3, 3, 1, bias=False)
    torch.nn.init.dirac_(network.weight)
    files = find_images(folders / "val")
    result = evaluate_network(network, files, "sr8")
    assert result["psnr"] == result["input_psnr"]
    clean = create_degradation("sr8").crop(read_rgb8(files[1])).float()[None] / 255
    y = create_degradation("sr8")(clean, generator=evaluation_generator(0, 1))
    given = create_degradation("sr8").network_input(y).clamp(0, 1).mul(255).round() / 255
    expected = -10 * math.log10((given - clean).double().square().mean())
    assert math.isclose(result["images"][1]["input_psnr"], expected, rel_tol=1e-5)


def test_the_protocol_is_that_of_the_call(folders):
    """What a network that changes nothing restores is what it was given; Y has less of the noise than RGB."""
    files = find_images(folders / "val")
    found = {name: evaluate_network(torch.nn.Identity(), files, "denoise", protocol=name) for name in ("rgb", "jpeg")}
    assert found["jpeg"]["protocol"] == "jpeg"
    for result in found.values():
        assert result["psnr"] == result["input_psnr"]
        assert result["ssim"] == result["input_ssim"]
    assert found["jpeg"]["psnr"] > found["rgb"]["psnr"] + 2
    with pytest.raises(UsageError, match="unknown protocol 'psnr'; the known ones are rgb, sr"):
        evaluate_network(torch.nn.Identity(), files, "denoise", protocol="psnr")


def test_images_without_a_truth_are_restored_as_they_are(tmp_path):
    pytest.importorskip("brisque", reason="its library in C++ was not built: there was no compiler")
    noisy = data.astronaut()[:128, 150:300].astype(int) + np.random.default_rng(0).normal(0, 12, (128, 150, 3))
    for name, pixels in (("noisy", noisy.clip(0, 255)), ("flat", np.full((64, 64, 3), 90))):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    network, options = small_network("sr2"), json.dumps({"dim": 8, "blocks": [1, 1]})
    about = {"task": "sr2", "network": "serpent_l", "options": options}
    save_file(network.state_dict(), tmp_path / "w.safetensors", about)
    found = evaluate_without_truth(tmp_path, "serpent_l", weights=tmp_path / "w.safetensors", device="cpu")
    flat, noisy_row = found["images"]
    assert math.isnan(flat["input_brisque"])
    image = read_rgb8(tmp_path / "noisy.png")[None] / 255
    brisque = Brisque()
    assert noisy_row["brisque"] == brisque(restore(image, network)).item()
    larger = F.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False)
    assert noisy_row["input_brisque"] == pytest.approx(brisque(larger).item(), abs=0.05)
    assert (found["n"], found["n_brisque"], found["brisque"]) == (2, 1, noisy_row["brisque"])
