"""The weights that ship: which, what the files hold, what their cards say, and that they restore."""

import csv
import hashlib
import json
import re

import pytest
import skimage.data
import torch

from serpent_ir import Restorer, create_degradation, create_model, list_models, restore
from serpent_ir.degradations import add_noise, evaluation_generator
from serpent_ir.degradations.blur import blur_each
from serpent_ir.image import to_tensor
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import psnr, ssim
from serpent_ir.models import DEFAULT_WEIGHTS, WEIGHTS_DIR, licence_of, load_weights

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

SHIPPED = {  # all of them; at least so many dB on faces256/val: what was measured, rounded down to a tenth
    "serpent_b.deblur": 28.5,
    "serpent_b.sr8": 25.3,
    "serpent_h.deblur": 28.9,
    "serpent_h.sr8": 25.5,
    "serpent_l.deblur": 29.2,
    "serpent_l.denoise": 33.5,
    "serpent_l.photo": 32.8,
    "serpent_l.photo_x2": 29.9,
    "serpent_l.photo_x4": 26.6,
    "serpent_l.sr2": 35.8,
    "serpent_l.sr4": 30.6,
    "serpent_l.sr8": 25.6,
}
each = pytest.mark.parametrize("name", SHIPPED)

GAIN = {"deblur": 2.0, "sr8": 0.5}  # dB on a photo that no network was trained on


def test_exactly_these_ship_each_with_its_figures_and_its_card():
    assert list_models(pretrained=True) == sorted(SHIPPED)
    files = {f"{name}.{suffix}" for name in SHIPPED for suffix in ("safetensors", "json", "md")}
    assert {path.name for path in WEIGHTS_DIR.iterdir()} == {"LICENSE", "ATTRIBUTION.csv", *files}


@each
def test_the_card_says_the_licence_and_the_licence_names_the_file(name):
    licence = licence_of(name)
    assert f"**Licence**: {licence} (file LICENSE" in (WEIGHTS_DIR / f"{name}.md").read_text()
    text = " ".join((WEIGHTS_DIR / "LICENSE").read_text().split())
    assert licence.replace(" ", "-", 1).replace(" ", "-") in text
    free, others = text.split("are licensed under the Creative Commons Attribution-ShareAlike 4.0")
    assert (f"{name}.safetensors" in free) == (licence == "CC BY-SA 4.0")
    assert f"{name}.safetensors" not in others  # which names no file: it is of all that are left


@pytest.mark.parametrize("name", [name for name in SHIPPED if licence_of(name) == "CC BY-SA 4.0"])
def test_photographs_with_free_licences_are_attributed(name):
    """Each image that the card counts, with a licence that allows what the weights' licence does."""
    with (WEIGHTS_DIR / "ATTRIBUTION.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert f"{len(rows)} images of 512x512" in (WEIGHTS_DIR / f"{name}.md").read_text()
    assert len({row["file"] for row in rows}) == len(rows)
    for row in rows:
        assert row["file"].startswith("train/")
        assert row["author"]
        assert not re.search(r"GPL|GFDL|NC|ND|not stated", row["licence"])
        assert re.match(r"CC.BY|CC0|BSD|public domain", row["licence"], re.IGNORECASE)
    training = json.loads((WEIGHTS_DIR / f"{name}.json").read_text())["training"]
    while training:  # no run began from other weights
        assert all("free/train" in folder for folder in training["train"])
        assert ("before" in training) == bool(training.get("start"))
        training = training.get("before")


@each
def test_files_are_float16_and_say_what_they_are(name):
    network, _, task = name.partition(".")
    state, metadata = load_weights(WEIGHTS_DIR / f"{name}.safetensors")
    assert (metadata["network"], metadata["task"]) == (network, task)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < 8e6
    assert (WEIGHTS_DIR / "LICENSE").stat().st_size > 0


@each
def test_the_card_says_what_an_evaluation_measured(name):
    card = json.loads((WEIGHTS_DIR / f"{name}.json").read_text())
    content = (WEIGHTS_DIR / f"{name}.safetensors").read_bytes()
    assert (card["name"], card["sha256"]) == (name, hashlib.sha256(content).hexdigest())
    rows = {row["data"]: row for row in card["evaluations"]}
    assert rows.keys() >= {"faces256/val", "natural/val"}
    text = (WEIGHTS_DIR / f"{name}.md").read_text()
    for row in rows.values():
        assert (row["model"], row["task"]) == (name, name.partition(".")[2])
        assert row["psnr"] > row["input_psnr"]
        assert row["ssim"] > row["input_ssim"]
        assert all(f"{row[prefix + 'psnr']:.2f}" in text for prefix in ("", "input_"))
        assert all(f"{row[prefix + 'ssim']:.4f}" in text for prefix in ("", "input_"))
    assert rows["faces256/val"]["psnr"] >= SHIPPED[name]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith(".sr8")])
def test_sr8_was_measured_against_bicubic_on_larger_faces_too(name):
    card = json.loads((WEIGHTS_DIR / f"{name}.json").read_text())
    rows = {row["data"]: row for row in card["evaluations"]}
    assert rows.keys() >= {"faces512/val"}
    assert rows["faces512/val"]["n"] == 67
    assert rows["faces512/val"]["psnr"] > rows["faces512/val"]["input_psnr"]  # the input of sr8 is bicubic's


@each
def test_a_photo_is_restored(name):
    task = name.partition(".")[2]
    degradation = create_degradation(task)
    clean = to_tensor(skimage.data.astronaut()[:192, 128:320].copy())
    given = degradation.network_input(degradation(clean, generator=evaluation_generator(0, 0)))
    restored, before = run_network(create_model(name, pretrained=True), given), degradation.before(given)
    assert psnr(restored, clean).item() > psnr(before, clean).item() + GAIN.get(task, 0)
    assert ssim(restored, clean).item() > ssim(before, clean).item()


def test_the_card_of_photo_tells_every_strength_and_none_does_harm():
    grid = json.loads((WEIGHTS_DIR / "serpent_l.photo.json").read_text())["grid"]
    text = (WEIGHTS_DIR / "serpent_l.photo.md").read_text()
    cells = {(cell["blur"], cell["noise"], cell["jpeg"]): cell for cell in grid["cells"]}
    assert len(cells) == 36
    untouched = cells.pop((0, 0.0, None))
    assert f"undegraded → {untouched['psnr']:.1f}" in text
    for cell in cells.values():
        assert f"| {cell['input_psnr']:.2f} → {cell['psnr']:.2f} " in text
        assert cell["psnr"] > cell["input_psnr"]
    assert (grid["data"], grid["undegraded"]["n"]) == ("natural/val", 161)
    assert grid["undegraded"]["psnr"] >= 48  # the bar


def test_the_card_of_photo_tells_what_it_does_to_photographs():
    bars = json.loads((WEIGHTS_DIR / "serpent_l.photo.json").read_text())["bars"]
    text = (WEIGHTS_DIR / "serpent_l.photo.md").read_text()
    noisy, natural, free, jpeg = (bars[k] for k in ("real_noise", "natural/val", "free/val", "natural/val, JPEG 75"))
    assert (noisy["n"], natural["n"], free["n"], jpeg["n"]) == (45, 161, 36, 161)
    assert noisy["gain"] > 1.5
    assert noisy["better"] >= 43
    assert min(natural["psnr"], free["psnr"], free["worst"]) > 48
    assert jpeg["better"] >= 154
    for bar in (noisy, jpeg):
        assert (
            f"| {bar['n']} | {bar['input_psnr']:.2f} | {bar['psnr']:.2f} | {bar['gain']:+.2f} | {bar['better']} |"
            in text
        )
        gains = [row["psnr"] - row["input_psnr"] for row in bar["images"]]
        assert bar["gain"] == pytest.approx(sum(gains) / len(gains))
        assert bar["better"] == sum(gain > 0 for gain in gains)


def test_the_default_leaves_a_good_photo_alone_and_mends_a_poor_one():
    clean = to_tensor(skimage.data.astronaut()[:192, 128:320].copy())
    restorer = Restorer(device="cpu")
    assert restorer.model.config.task == DEFAULT_WEIGHTS.partition(".")[2] == "photo"
    assert psnr(restorer(clean), clean).item() > 38
    poor = add_noise(blur_each(clean, torch.tensor([1.0])), 0.03, evaluation_generator(0, 0)).clamp(0, 1)
    mended = restore(poor, device="cpu")
    assert torch.equal(mended, restorer(poor))
    assert psnr(mended, clean).item() > psnr(poor, clean).item() + 1
