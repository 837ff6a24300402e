"""Training on a few images that code draws: what it leaves, plans and refuses."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from serpent_ir import create_model, load_model
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.evaluate import evaluate, evaluate_network
from serpent_ir.image.folders import find_images
from serpent_ir.models import load_weights
from serpent_ir.train import plan, train
from serpent_ir.training.checkpoints import Checkpoints
from serpent_ir.training.recipe import Recipe, Stage
from serpent_ir.training.schedule import Schedule
from training_files import TINY, draw_folders, draw_image, quiet_trainer, recipe_file, rows_of


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def test_training_learns_logs_and_leaves_what_it_should(folders):
    stages = [{"crop": 32, "batch": 4, "steps": 60}]
    file = recipe_file(folders, "learn", stages=stages, lr=5e-3, val_every=30, ema=0.9)
    out = folders / "learn"
    before = quiet_trainer(file)
    untrained = evaluate_network(before.average, before.val.files, "deblur")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = train(file, tensorboard=True)
    assert torch.equal(state, torch.get_rng_state()), "training must leave the global random state alone"
    first, last = [row for row in rows_of(out) if "psnr" in row]
    assert (first["step"], last["step"]) == (30, 60)
    assert last["psnr"] > first["psnr"] > untrained["psnr"] + 1
    assert math.isclose(last["input_psnr"], untrained["input_psnr"])
    rows = [row for row in rows_of(out) if "loss" in row]
    assert [row["step"] for row in rows] == [30, 50, 60]
    assert rows[-1]["loss"] < rows[0]["loss"]
    again = evaluate_network(create_model("serpent_b", checkpoint_path=weights, **TINY), before.val.files, "deblur")
    assert again["psnr"] == last["psnr"]
    assert json.loads((out / "recipe.json").read_text())["model_options"] == TINY
    assert quiet_trainer(out / "recipe.json").schedule.steps == 60, "what was saved is a recipe"
    assert list((out / "tensorboard").glob("events.*"))
    with Image.open(out / "run.png") as plot, Image.open(out / "pictures" / "step-00000060.png") as strip:
        assert plot.size == (960, 840)
        assert strip.size == (3 * 48, 40 + 57)  # degraded, restored and clean of both images
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("serpent_b", TINY),
        ("unet_32", {"channels": 4, "pools": 2}),
        # Shapes tell nothing of the first, and the second is a release's window, whose range is another.
        ("swinir_60", {"dim": 12, "blocks": [2, 1], "heads": 2, "img_range": 255.0}),
        ("swinir_60", {"dim": 12, "blocks": [1, 1], "heads": 2, "window_size": 7}),
    ],
)
def test_weights_are_read_as_the_network_that_was_trained(folders, model, options):
    name, stages = f"{model}.options", [{"crop": 32, "batch": 2, "steps": 2}]
    file = recipe_file(folders, name, model=model, model_options=options, stages=stages, precision="bfloat16")
    weights, files = train(str(file)), find_images(folders / "val")
    measured = rows_of(folders / name)[-1]["psnr"]
    result = evaluate(folders / "val", "deblur", model, weights=weights, precision="bfloat16")
    assert (result["psnr"], result["precision"], result["weights"]) == (measured, "bfloat16", str(weights))
    for network in (create_model(model, checkpoint_path=weights), load_model(weights)):
        kept = json.loads(json.dumps({key: getattr(network.config, key) for key in options}))
        assert kept == json.loads(json.dumps(options))
        assert evaluate_network(network, files, "deblur", precision="bfloat16")["psnr"] == measured
    damaged = folders / "damaged.safetensors"
    state, metadata = load_weights(weights)
    save_file(state, damaged, {**metadata, "options": "[1"})
    for load in (load_model, lambda path: create_model(model, checkpoint_path=path)):
        with pytest.raises(SerpentError, match=r"damaged \(its options are no JSON object\); get the file again$"):
            load(damaged)


def test_the_weights_of_the_best_validation_are_a_file_of_their_own(folders, capsys):
    file = recipe_file(folders)
    out = train(file).parent
    checkpoint = out / "checkpoints" / "step-00000008"
    measured = json.loads((checkpoint / "score.json").read_text())
    del measured["sha256"]
    for psnr in (99.0, 0.0):
        Checkpoints(out / "checkpoints", keep=9).score(checkpoint, {**measured, "psnr": psnr})
        capsys.readouterr()
        train(file, resume=True)
        told = f", those of the best validation, at step 8, in {out / 'best.safetensors'}\n"
        assert (told in capsys.readouterr().err) == (out / "best.safetensors").exists() == (psnr == 99)
        if psnr == 99:
            state, metadata = load_weights(out / "best.safetensors")
            kept = {}
            for part in checkpoint.glob("average.*.safetensors"):
                kept |= load_file(part)
            assert metadata == {**load_weights(out / "weights.safetensors")[1], "step": "8"}
            assert state.keys() == kept.keys()
            assert all(torch.equal(state[key], kept[key]) for key in kept)
            load_model(out / "best.safetensors")


def test_the_learning_rate_warms_up_and_falls_to_zero(folders):
    schedule = quiet_trainer(recipe_file(folders, warmup=4, lr=0.5)).schedule
    rates = [schedule.lr(step) for step in range(11)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[0] == 0.5 / 4
    assert rates[5] == pytest.approx(0.25)  # half-way along the cosine
    assert rates[10] == pytest.approx(0, abs=1e-12)


def test_the_schedule_is_a_function_of_the_step():
    stages = [Stage(8, 4, steps=3), Stage(16, 2, epochs=5 / 3)]
    recipe = Recipe("serpent_b", "deblur", [""], "", "", stages, val_every=4)
    schedule = Schedule(recipe, tuple(recipe.steps_of(stage, 6) for stage in stages))
    assert schedule.lengths == (3, 5)  # 10 samples in steps of 2
    drawn = [sample for step in range(schedule.steps) for sample in schedule.samples(step)]
    assert drawn == list(range(3 * 4 + 5 * 2))
    assert [done for done in range(9) if schedule.validates(done)] == [3, 4, 8]
    # After two steps of a second each: one step of 4 x 8 x 8 pixels, five of 2 x 16 x 16, which is twice as many.
    assert schedule.seconds_left(2, 1.0) == 1 + 5 * 2
    assert schedule.seconds_left(8, 1.0) == 0
    assert [schedule.decay(step) for step in (0, 10**6)] == [0.1, recipe.ema]


def test_a_plan_measures_every_stage_and_writes_nothing(folders):
    stages = [{"crop": 16, "batch": 4, "steps": 6}, {"crop": 32, "batch": 4, "epochs": 2}]
    file = recipe_file(folders, stages=stages, val_every=4)
    measured = plan(file, images=1000)
    assert [(s.steps, s.images) for s in measured.stages] == [(6, 24), (500, 2000)]
    assert (measured.images, measured.validations) == (1000, 506 // 4 + 2)
    assert all(stage.seconds > 0 and stage.memory > 0 for stage in measured.stages)
    by_hand = sum(s.steps * s.seconds for s in measured.stages) + measured.validations * measured.validation_seconds
    assert measured.hours == pytest.approx(by_hand / 3600)
    assert [s.steps for s in plan(file).stages] == [6, 2]  # 5 images
    assert not (folders / "run").exists()


@pytest.mark.parametrize(
    "name", ["serpent_h.deblur", "serpent_b.deblur", "serpent_h.sr8", "serpent_b.sr8", "serpent_l.photo.first"]
)
def test_recipes_of_weights_to_come_can_be_planned(folders, name):
    overrides = [f"train=[{folders}/train]", f"val={folders}/val", f"out={folders}/run", "device=cpu"]
    overrides += ["stages=[{crop: 16, batch: 1, steps: 9}, {crop: 32, batch: 1, steps: 9}]"]
    measured = plan(Path(__file__).parents[2] / "configs" / f"{name}.yaml", overrides)
    assert f"{measured.model}.{measured.task}" in name
    assert all(stage.seconds > 0 for stage in measured.stages)


def test_what_training_refuses(folders):
    told = r"stages\.1\.crop is 48; it must be at most 40 for \S+/train/3\.png: 40x48; or remove it"
    with pytest.raises(UsageError, match=rf"run\.yaml: {told}"):
        train(recipe_file(folders, stages=[{"crop": crop, "batch": 1, "steps": 1} for crop in (40, 48)]))
    with pytest.raises(UsageError, match=rf"^command line: {told}"):
        train(recipe_file(folders), ["stages.1.crop=48"])
    with pytest.raises(UsageError, match=r"run\.yaml: val: /nowhere: no such folder"):
        train(recipe_file(folders, val="/nowhere"))
    recipe_file(folders, "below", train=["x.serpent[:9]"])
    above = folders / "above.yaml"
    above.write_text("base: below.yaml\nseed: 1\n")
    with pytest.raises(UsageError, match=r"below\.yaml: train: x\.serpent: no such packed set; make it"):
        train(above)
    with pytest.raises(UsageError, match=r"^command line: train: x\.serpent: no such packed set"):
        train(above, ["train.0=x.serpent"])
    with pytest.raises(UsageError, match=r"^command line: device: no device 'gpu' here; valid: auto"):
        train(above, ["device=gpu"])
    recipe_file(folders, "below", model_options={"width": 3})
    with pytest.raises(
        UsageError, match=r"below\.yaml: model_options\.width: serpent_b has no option width; valid: pa"
    ):
        train(above)
    with pytest.raises(UsageError, match=r"^command line: model_options\.dim: expected an integer above zero"):
        train(above, ["model_options={}", "model_options.dim=abc"])
    for options, told in [
        ({"dim": "abc"}, "model_options.dim: expected an integer above zero, got str 'abc'"),
        ({"dim": True}, "model_options.dim: expected an integer above zero, got bool True"),
        ({"blocks": [1, 0]}, r"model_options.blocks: expected a list of integers above zero, got list \[1, 0\]"),
        ({"blocks": 2}, "model_options.blocks: expected a list of integers above zero, got int 2"),
        ({"task": "sr8"}, "model_options.task: the recipe's own key task says it"),
    ]:
        with pytest.raises(UsageError, match=rf"run\.yaml: {told}"):
            train(recipe_file(folders, model_options=options))
    assert not (folders / "run").exists(), "what is refused leaves no folder behind"
    with pytest.raises(SerpentError, match=r"0\.png: cannot be made a folder .*choose another out="):
        train(recipe_file(folders, out="train/0.png"))
    with pytest.raises(SerpentError, match=r"not finite in 5 steps in a row"):
        train(recipe_file(folders, "wild", lr=1e30, clip=1e30))


def test_a_bad_validation_image_is_found_before_training(folders):
    (folders / "val" / "x.png").write_bytes((folders / "val" / "0.png").read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"x\.png"):
        quiet_trainer(recipe_file(folders))
    draw_image(9, 30, 0).save(folders / "val" / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: 9x30 px is too small to compare"):
        quiet_trainer(recipe_file(folders))


def test_a_run_may_start_from_other_weights(folders):
    first = quiet_trainer(recipe_file(folders, "first")).run(stop_after_minutes=0)
    on = quiet_trainer(recipe_file(folders, "on", start=str(first)))
    for name, tensor in load_file(first).items():
        assert torch.equal(on.network.state_dict()[name], tensor), name
    shipped = {"model": "serpent_l", "start": "serpent_l.sr8", "model_options": {}}
    assert quiet_trainer(recipe_file(folders, "l", **shipped)).step == 0
    on.run(stop_after_minutes=0)
    first.unlink()
    quiet_trainer(recipe_file(folders, "on", start=str(first))).run(resume=True)  # which needs them no more


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "serpent_b.sr8"}, r"run\.yaml: model: unknown model 'serpent_b\.sr8'; valid: serpent_b"),
        (
            {"model": "swinir_b", "model_options": {"dim": 7}},
            r"run\.yaml: model_options: 7 channels cannot be shared out among 6",
        ),
        (
            {"model": "restormer_24", "model_options": {"dim": 25}},
            "model_options: restormer: dim is 25; it must be even",
        ),
        ({"model_options": {"in_channels": 1}}, "model_options.in_channels is 1; it must be 3 for the task deblur"),
        ({"task": "inpaint", "model_options": {"in_channels": 3}}, "model_options.in_channels is 3; it must be 4"),
        ({"model": "unet_32", "model_options": {"out_channels": 1}}, "model_options.out_channels is 1; it must be 3"),
        ({"start": "serpent_l.sr8"}, r"run\.yaml: start: serpent_l\.sr8: not weights of serpent_b: "),
        ({"start": "serpent_l"}, r"start: serpent_l: no such weights file, and none that ships: serpent_b\.deblur"),
    ],
)
def test_what_is_wrong_with_a_network_is_said_before_images_are_read(folders, changes, told):
    for name in ("train", "val"):
        (folders / name / "bad.png").write_bytes(b"")
    with pytest.raises(SerpentError, match=told):
        train(recipe_file(folders, **changes))


def test_a_missing_tensorboard_is_said_before_images_are_read(folders, monkeypatch):
    (folders / "val" / "bad.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"--tensorboard needs TensorBoard: pip install 'serpent-ir\[tensorboard\]'"):
        train(recipe_file(folders), tensorboard=True)


def test_validation_computes_in_the_recipes_precision(folders, monkeypatch):
    asked = []

    def note(network, x, *, precision):
        asked.append(precision)
        return x[:, :3]

    monkeypatch.setattr("serpent_ir.evaluate.run_network", note)
    quiet_trainer(recipe_file(folders, precision="bfloat16")).run(stop_after_minutes=0)
    assert asked == ["bfloat16"] * 2


def test_the_memory_of_a_host_is_shared_by_its_processes(folders, monkeypatch):
    monkeypatch.setattr("serpent_ir.data.store.host_available", lambda: 60_000)  # five images take 33,000
    assert len(quiet_trainer(recipe_file(folders)).data) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="fill the memory"):
        quiet_trainer(recipe_file(folders))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE is 'two' in the environment"):
        quiet_trainer(recipe_file(folders))
