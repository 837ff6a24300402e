"""The weights that ship: what the files hold, what their cards say, and that they restore."""

import json

import pytest
import skimage.data
import torch

from serpent_ir import create_degradation, create_model, list_models
from serpent_ir.degradations import evaluation_generator
from serpent_ir.image import to_tensor
from serpent_ir.inference import run_network
from serpent_ir.metrics import psnr, ssim
from serpent_ir.models import WEIGHTS_DIR, load_weights

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:serpent_ir"),
    pytest.mark.parametrize("name", list_models(pretrained=True)),
]

LEAST = {"serpent_l.deblur": 28.5}  # dB on faces256/val
GAIN = {"deblur": 2.0, "sr8": 0.5}  # dB on a photo that no network was trained on


def test_files_are_float16_and_say_what_they_are(name):
    network, _, task = name.partition(".")
    state, metadata = load_weights(WEIGHTS_DIR / f"{name}.safetensors")
    assert (metadata["network"], metadata["task"]) == (network, task)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < 8e6
    assert (WEIGHTS_DIR / "LICENSE").stat().st_size > 0


def test_the_card_says_what_an_evaluation_measured(name):
    rows = {row["data"]: row for row in json.loads((WEIGHTS_DIR / f"{name}.json").read_text())["evaluations"]}
    assert rows.keys() >= {"faces256/val", "natural/val"}
    text = (WEIGHTS_DIR / f"{name}.md").read_text()
    for row in rows.values():
        assert (row["model"], row["task"]) == (name, name.partition(".")[2])
        assert row["psnr"] > row["input_psnr"]
        assert row["ssim"] > row["input_ssim"]
        assert all(f"{row[prefix + 'psnr']:.2f}" in text for prefix in ("", "input_"))
        assert all(f"{row[prefix + 'ssim']:.4f}" in text for prefix in ("", "input_"))
    assert rows["faces256/val"]["psnr"] >= LEAST.get(name, 0)


def test_a_photo_is_restored(name):
    task = name.partition(".")[2]
    degradation = create_degradation(task)
    clean = to_tensor(skimage.data.astronaut()[:192, 128:320].copy())
    given = degradation.network_input(degradation(clean, generator=evaluation_generator(0, 0)))
    restored = run_network(create_model(name, pretrained=True), given)
    assert psnr(restored, clean).item() > psnr(given, clean).item() + GAIN.get(task, 0)
    assert ssim(restored, clean).item() > ssim(given, clean).item()
