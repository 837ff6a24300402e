"""The tasks beyond the paper's, from a recipe to weights, an evaluation and the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

import serpent_ir
from serpent_ir.degradations import DEGRADATIONS, create_degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.evaluate import evaluate_network
from serpent_ir.files.compare import PANEL, draw_panels, find_detail
from serpent_ir.image import read_image, to_tensor
from serpent_ir.metrics import psnr
from serpent_ir.models import TASK_CHANNELS, TASK_SCALES, list_models

RECIPES = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(data.astronaut()[70 * i : 70 * i + 64, 150:214]).save(folder / f"{i}.png")
    return folder


def test_networks_take_the_channels_of_their_task_and_enlarge_as_it_asks():
    for task, degradation in DEGRADATIONS.items():
        assert TASK_CHANNELS.get(task, 3) == degradation.channels
        own = degradation.network_scale
        assert TASK_SCALES.get(task, 1) == own
        assert degradation.scale % own == 0
        for network in list_models("serpent_*") if own == 1 else ["serpent_l"]:
            with torch.device("meta"):
                model = serpent_ir.create_model(f"{network}.{task}")
                assert model(torch.empty(1, degradation.channels, 32, 32)).shape == (1, 3, 32 * own, 32 * own)


@pytest.mark.parametrize("task", ["denoise", "jpeg", "inpaint", "photo"])
def test_a_recipe_trains_and_evaluates(task, photos, tmp_path):
    from serpent_ir.cli import train

    overrides = [f"train=[{photos}]", f"val={photos}", f"out={tmp_path / 'run'}", "device=cpu", "model=serpent_b"]
    overrides += ["stages=[{crop: 32, batch: 2, steps: 2}]", "start=''"]  # photo's goes on from weights of serpent_l
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
    result = evaluate_network(torch.nn.Identity(), files, "clean")  # a baseline, without a parameter
    assert (result["n_psnr"], result["input_psnr"], result["psnr"]) == (len(files), math.inf, math.inf)
    seen = []

    def one_untouched(image):
        seen.append(image)
        return image if len(seen) == 2 else image * 0.9

    monkeypatch.setitem(DEGRADATIONS, "clean", clean.__class__("clean", operator=one_untouched, sigma=0.0))
    result = evaluate_network(torch.nn.Conv2d(3, 3, 1), files, "clean")
    assert result["images"][1]["input_psnr"] == math.inf
    # Both means are of the same images: that one's finite PSNR after the network counts as little.
    others = [row for i, row in enumerate(result["images"]) if i != 1]
    assert result["n_psnr"] == len(files) - 1
    for key in ("input_psnr", "psnr"):
        assert result[key] == pytest.approx(np.mean([row[key] for row in others]))
    assert result["ssim"] == pytest.approx(np.mean([row["ssim"] for row in result["images"]]))
    json.dumps(result["input_psnr"], allow_nan=False)


def save_weights(folder: Path, task: str) -> Path:
    file = folder / f"{task}.safetensors"
    torch.manual_seed(0)
    model = serpent_ir.create_model(f"serpent_b.{task}")
    save_file(model.state_dict(), file, {"network": "serpent_b", "task": task})
    return file


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    with torch.random.fork_rng():
        return save_weights(tmp_path_factory.mktemp("weights"), "inpaint")


def test_inpainting_changes_the_holes_alone(photos, inpainting, tmp_path):
    from serpent_ir.cli import degrade, restore

    degrade([photos], tmp_path / "holed", task="inpaint", seed=3, masks=tmp_path / "masks")
    restore([tmp_path / "holed"], tmp_path / "out", weights=inpainting, mask=tmp_path / "masks")
    for i in range(6):
        clean, holed, mask, out = (
            np.asarray(Image.open(folder / f"{i}.png"))
            for folder in (photos, tmp_path / "holed", tmp_path / "masks", tmp_path / "out")
        )
        hole = mask > 127
        assert 0 < hole.mean() < 1
        assert not holed[hole].any()
        assert np.array_equal(out[~hole], clean[~hole])
        assert out[hole].any()
    model = serpent_ir.create_model("serpent_b", checkpoint_path=inpainting)
    as_pil = serpent_ir.restore(Image.fromarray(holed), model, mask=Image.fromarray(mask))
    assert np.array_equal(np.asarray(as_pil), out)
    as_tensor = serpent_ir.restore(torch.tensor(holed).permute(2, 0, 1), model, mask=torch.tensor(hole))
    assert np.array_equal(as_tensor.permute(1, 2, 0).numpy(), out)
    tiled = serpent_ir.restore(holed, model, mask=hole, tile=32, tile_overlap=0)
    assert np.array_equal(tiled[~hole], clean[~hole])


def test_masks_are_asked_for_and_must_fit(photos, inpainting, tmp_path):
    from serpent_ir.cli import restore

    model = serpent_ir.create_model("serpent_b", checkpoint_path=inpainting)
    image = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(UsageError, match="weights of inpaint need a mask"):
        serpent_ir.restore(image, model)
    with pytest.raises(UsageError, match="the mask is 8x9 px and the image 9x8"):
        serpent_ir.restore(image, model, mask=np.zeros((9, 8), bool))
    with pytest.raises(UsageError, match="these take none"):
        serpent_ir.restore(image, serpent_ir.create_model("serpent_b.deblur"), mask=np.zeros((8, 9), bool))
    with pytest.raises(SerpentError, match=r"0\.png: .*holds no mask of that name"):
        restore([photos / "0.png"], tmp_path / "out.png", weights=inpainting, mask=tmp_path)
    # What would be wrong with every image is said before the first.
    for weights, options, said in (
        (inpainting, {}, "weights of inpaint need --mask"),
        (save_weights(tmp_path, "deblur"), {"mask": photos / "0.png"}, "these take none"),
        (inpainting, {"mask": tmp_path / "none"}, "none: no such file or folder"),
        (inpainting, {"mask": photos, "compare": True, "reference": tmp_path / "no.png"}, r"no\.png: no such file"),
    ):
        with pytest.raises(UsageError, match=said):
            restore([photos], tmp_path / "wrong", weights=weights, **options)
    assert not (tmp_path / "wrong").exists()


def test_comparisons_are_drawn_and_measured(photos, tmp_path, capsys):
    from serpent_ir.cli import degrade, restore

    degrade([photos], tmp_path / "bad", task="sr8")
    restore([tmp_path / "bad"], tmp_path / "out", name="serpent_l.sr8", compare=True, reference=photos, as_json=True)
    rows = json.loads(capsys.readouterr().out)["images"]
    assert len(rows) == 6
    for row in rows:
        source, target = Path(row["source"]), Path(row["target"])
        clean, restored = (to_tensor(read_image(file).pixels) for file in (photos / source.name, target))
        assert row["psnr"] == pytest.approx(psnr(restored, clean).item())
        assert row["psnr"] > row["input_psnr"]
        sheet = np.asarray(Image.open(target.with_name(f"{target.stem}-compare.png")))
        assert sheet.shape[1] > 3 * 64  # three panels
        third = sheet[36:100, 12 + 2 * (256 + 12) :][:64, :64]  # the reference, not shrunk; a frame marks the detail
        assert (third == np.asarray(Image.open(photos / source.name))).all(-1).mean() > 0.8
    assert len(list((tmp_path / "out").glob("*-compare.png"))) == 6
    restore([tmp_path / "bad" / "0.png"], tmp_path / "one.png", name="serpent_l.sr8", compare=True)
    assert (tmp_path / "one-compare.png").exists()
    with pytest.raises(SerpentError, match=r"bad/0\.png: is 8x8 px and the restored image 64x64"):
        restore(
            [tmp_path / "bad" / "0.png"],
            tmp_path / "two.png",
            name="serpent_l.sr8",
            compare=True,
            reference=tmp_path / "bad" / "0.png",
        )
    with pytest.raises(UsageError, match="--compare would overwrite"):
        Image.new("RGB", (9, 9)).save(tmp_path / "bad" / "0-compare.png")
        restore([tmp_path / "bad"], tmp_path / "out", name="serpent_l.sr8", compare=True)


def test_the_detail_is_where_the_edges_are():
    image = torch.full((1, 3, 100, 150), 0.5)
    image[..., 70:80, 100:110] = torch.rand(10, 10)
    left, top, right, bottom = find_detail(image)
    assert left <= 100 and right >= 110
    assert top <= 70 and bottom >= 80
    assert find_detail(torch.zeros(1, 3, 1, 1)) == (0, 0, 1, 1)
    for height, width in ((3000, 9), (9, 3000)):  # a strip's detail fits on the sheet
        strip = Image.new("RGB", (width, height))
        sheet = draw_panels({"a": strip, "b": strip}, find_detail(torch.zeros(1, 3, height, width)))
        assert max(sheet.size) <= 2 * PANEL + 100
