"""Training and evaluation on a few images that code draws."""

import json
import math

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from serpent_ir import create_model
from serpent_ir.data import find_images, read_rgb8
from serpent_ir.degradations import create_degradation, evaluation_generator
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.evaluate import evaluate, evaluate_network
from serpent_ir.recipe import load_recipe
from serpent_ir.train import Trainer, own_stream, train


def draw_image(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with a few hard edges."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=g)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    image[..., height // 3 : height // 2, width // 4 :] = torch.rand(1, 3, 1, 1, generator=g)
    return Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy())


@pytest.fixture
def folders(tmp_path):
    for name, sizes in {
        "train": [(48, 48), (48, 40), (48, 48), (40, 48), (48, 48)],
        "val": [(48, 40), (33, 57)],
    }.items():
        (tmp_path / name / "sub").mkdir(parents=True)
        for i, size in enumerate(sizes):
            draw_image(*size, seed=i).save(tmp_path / name / ("sub" if i == 1 else "") / f"{i}.png")
    return tmp_path


def recipe_file(folders, out="run", **changes):
    recipe = {
        "model": "serpent_b",
        "task": "deblur",
        "train": [str(folders / "train")],
        "val": str(folders / "val"),
        "out": str(folders / out),
        "stages": [{"crop": 16, "batch": 4, "steps": 6}, {"crop": 32, "batch": 2, "steps": 4}],
        "warmup": 2,
        "val_every": 4,
        "device": "cpu",
    }
    file = folders / f"{out}.yaml"
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


def test_training_is_the_same_when_interrupted(folders):
    torch.manual_seed(5)
    whole = load_file(train(recipe_file(folders)))
    state = torch.get_rng_state()
    trainer = Trainer(load_recipe(recipe_file(folders, "parts")), say=lambda line: None)
    for _ in range(3):  # three steps that are lost, then a checkpoint at step 4 by hand
        trainer._train_step(*trainer._place(trainer.step)[1:])
        trainer.step += 1
    trainer._train_step(*trainer._place(trainer.step)[1:])
    trainer.step += 1
    trainer.save()
    trainer.step = 5
    trainer._log("a row of a step that is lost", loss=0.5)
    resumed = Trainer(load_recipe(recipe_file(folders, "parts")), say=lambda line: None)
    assert resumed.step == 4
    assert (folders / "parts" / "log.jsonl").read_text() == ""
    parts = load_file(resumed.run())
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert torch.equal(state, torch.get_rng_state()), "training must leave the global random state alone"


def test_the_learning_rate_warms_up_and_falls_to_zero(folders):
    trainer = Trainer(load_recipe(recipe_file(folders, warmup=4, lr=0.5)), say=lambda line: None)
    rates = []
    for trainer.step in range(11):
        rates.append(trainer._lr())
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[0] == 0.5 / 4
    assert rates[5] == pytest.approx(0.25)  # half-way along the cosine
    assert rates[10] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] No space left")]
)
def test_a_full_disk_leaves_the_old_checkpoint_whole(folders, monkeypatch, error):
    trainer = Trainer(load_recipe(recipe_file(folders)), say=lambda line: None)
    trainer.save()
    old = (folders / "run" / "state.pt").read_bytes()

    def full_disk(_content, path, *_):
        path.write_bytes(b"half of it")
        raise error

    trainer.step = 1
    with (
        monkeypatch.context() as patched,
        pytest.raises(SerpentError, match=r"state\.pt: cannot be written .*No space"),
    ):
        patched.setattr("torch.save", full_disk)
        trainer.save()
    assert not list((folders / "run").glob("*.part"))
    assert (folders / "run" / "state.pt").read_bytes() == old
    load_file(folders / "run" / "weights.safetensors")
    assert Trainer(load_recipe(recipe_file(folders)), say=lambda line: None).step == 0


def test_training_learns_logs_and_leaves_loadable_weights(folders):
    file = recipe_file(folders, "learn", stages=[{"crop": 32, "batch": 4, "steps": 40}], lr=2e-3, val_every=20, ema=0.9)
    before = Trainer(load_recipe(file), say=lambda line: None)
    untrained = evaluate_network(before.average, before.val_files, "deblur")
    weights = train(file)
    rows = [json.loads(line) for line in (folders / "learn" / "log.jsonl").read_text().splitlines()]
    first, last = [row for row in rows if "psnr" in row]
    assert (first["step"], last["step"]) == (20, 40)
    assert last["psnr"] > first["psnr"] > untrained["psnr"] + 3
    assert math.isclose(last["input_psnr"], untrained["input_psnr"])
    assert create_model("serpent_b", checkpoint_path=weights).config.task == "deblur"
    assert not list((folders / "learn").glob("*.part"))
    with pytest.raises(SerpentError, match="holds a run of another recipe"):
        train(recipe_file(folders, "learn", seed=1))


def test_what_training_refuses(folders):
    with pytest.raises(ImageError, match=r"40x48 is smaller than the crop of 48|48x40 is smaller than the crop of 48"):
        train(recipe_file(folders, stages=[{"crop": 48, "batch": 1, "steps": 1}]))
    with pytest.raises(UsageError, match="no such folder"):
        train(recipe_file(folders, val="/nowhere"))
    with pytest.raises(UsageError, match=r"unknown model 'serpent_b\.sr8'; valid: serpent_b"):
        train(recipe_file(folders, model="serpent_b.sr8"))
    assert not (folders / "run").exists(), "what is refused leaves no folder behind"
    with pytest.raises(SerpentError, match=r"0\.png: cannot be made a folder .*choose another out="):
        train(recipe_file(folders, out="train/0.png"))
    with pytest.raises(SerpentError, match=r"the loss is (nan|inf) at step"):
        train(recipe_file(folders, "wild", lr=1e30, clip=1e30))


def test_a_bad_validation_image_is_found_before_training(folders):
    (folders / "val" / "x.png").write_bytes((folders / "val" / "0.png").read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"x\.png"):
        Trainer(load_recipe(recipe_file(folders)), say=lambda line: None)
    draw_image(9, 30, 0).save(folders / "val" / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: 9x30 px is too small to compare"):
        Trainer(load_recipe(recipe_file(folders)), say=lambda line: None)


def test_a_damaged_checkpoint_is_one_line(folders):
    (folders / "run").mkdir()
    Trainer(load_recipe(recipe_file(folders)), say=lambda line: None).save()
    state = folders / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(SerpentError, match=r"state\.pt: is damaged \(\w+\); remove it to start anew"):
        train(recipe_file(folders))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs are captured where there is one")
def test_a_captured_step_trains_as_a_plain_one(folders, monkeypatch):
    losses = {}
    for graphs in (False, True):
        monkeypatch.setattr("serpent_ir.train.CUDA_GRAPHS", graphs)
        recipe = load_recipe(recipe_file(folders, f"graphs{graphs}", device="cuda"))
        steps = []
        with own_stream(torch.device("cuda")):
            trainer = Trainer(recipe, say=lambda line: None)
            while trainer.step < trainer.steps:
                steps.append(trainer._train_step(*trainer._place(trainer.step)[1:]).item())
                trainer.step += 1
        losses[graphs] = steps
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


def test_a_run_may_start_from_other_weights(folders):
    first = train(recipe_file(folders, "first"))
    on = Trainer(load_recipe(recipe_file(folders, "on", start=str(first))))
    for name, tensor in load_file(first).items():
        assert torch.equal(on.network.state_dict()[name], tensor), name
    assert Trainer(load_recipe(recipe_file(folders, "l", model="serpent_l", start="serpent_l.sr8"))).step == 0
    with pytest.raises(UsageError, match=r"start: serpent_l\.sr8 holds no weights of serpent_b"):
        Trainer(load_recipe(recipe_file(folders, "bad", start="serpent_l.sr8")))
