import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serpent_ir.errors import UsageError
from serpent_ir.training.recipe import Recipe, Stage, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = {
    "model": "serpent_b",
    "task": "deblur",
    "train": ["a", "b"],
    "val": "c",
    "out": "d",
    "stages": [{"crop": 64, "batch": 2, "steps": 3}, {"crop": 128, "batch": 1, "steps": 4}],
}


@pytest.fixture
def write(tmp_path):
    def _write(**changes):
        file = tmp_path / "r.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in {**GOOD, **changes}.items() if v is not None}))
        return file

    return _write


def test_a_recipe_and_its_overrides(write):
    recipe = load_recipe(write(), ["lr=5e-4", "stages.1.steps=7", 'train=["x[0:3]"]', "seed=3", "model_options.dim=24"])
    assert recipe.model_options == {"dim": 24}
    assert recipe.lr == 5e-4
    assert recipe.stages == [Stage(64, 2, 3), Stage(128, 1, 7)]
    assert recipe.train == ["x[0:3]"]
    assert (recipe.seed, recipe.ema) == (3, 0.999)


@pytest.mark.parametrize(
    "changes, overrides, message",
    [
        ({"color": 1}, [], r"r\.yaml: unknown key color; valid: model, task, train"),
        ({"model": None}, [], r"r\.yaml: missing key model"),
        ({"seed": "x"}, [], r"r\.yaml: seed: expected int, got str 'x'"),
        ({"seed": True}, [], r"seed: expected int, got bool True"),
        ({"lr": "fast"}, [], r"lr: expected float, got str 'fast'"),
        ({"train": "a"}, [], r"train: expected a list, got str 'a'"),
        ({"train": [1]}, [], r"train\.0: expected str, got int 1"),
        ({"train": []}, [], r"train is empty"),
        ({"stages": []}, [], r"stages is empty"),
        ({"stages": [{"crop": 8, "steps": 1}]}, [], r"stages\.0: missing key batch"),
        ({"stages": [{"crop": 8, "batch": 1}]}, [], r"stages\.0 must have either steps or epochs above 0"),
        ({"stages": [{"crop": 8, "batch": 0, "steps": 1}]}, [], r"stages\.0\.batch is 0; it must be at least 1"),
        ({"stages": [3]}, [], r"stages\.0: expected keys and values, got int 3"),
        ({"lr": 0}, [], r"lr is 0.0; it must be positive"),
        ({"lr": float("nan")}, [], r"lr is nan; it must be positive"),
        ({"clip": float("inf")}, [], r"clip is inf; it must be positive"),
        ({"val_every": 0}, [], r"val_every is 0; it must be at least 1"),
        ({"warmup": -1}, [], r"warmup is -1; it must be 0 or more"),
        ({"seed": -1}, [], r"seed is -1; it must be 0 or more"),
        ({"seed": 1 << 63}, [], r"seed is 9223372036854775808; it must be"),
        ({"ema": 1}, [], r"ema is 1.0; it must be in \[0, 1\)"),
        ({"task": "blur"}, [], r"task: unknown degradation 'blur'; the known ones are deblur, sr8, .*photo"),
        ({"model": ""}, [], r"model is empty; it must be given"),
        ({"loss": "huber"}, [], r"loss: expected l1, l2, charbonnier or log, got str 'huber'"),
        ({"precision": 16}, [], r"precision: expected auto, float32 or bfloat16, got int 16"),
        ({"recompute": 1}, [], r"recompute: expected bool, got int 1"),
        ({"frequency": -0.1}, [], r"frequency is -0.1; it must be 0 or more"),
        ({"mix": ["blur"]}, [], r"mix\.0: unknown degradation 'blur'; the known ones are"),
        ({"mix": ["deblur", "sr8"]}, [], r"mix\.1 is sr8; it must be a task that makes images as deblur does"),
        ({"keep": 0}, [], r"keep is 0; it must be at least 1"),
        ({"accumulate": 4}, [], r"stages\.0\.batch is 2; it must be a multiple of accumulate, which is 4"),
        ({"task": "sr8", "stages": [{"crop": 20, "batch": 1, "epochs": 1}]}, [], r"crop is 20; .*multiple of 8 .* sr8"),
        ({}, ["stages.0.crop=192"], r"stages\.1\.crop is 128; it must be at least that of the stage before, 192"),
        ({}, ["stages.0.epochs=2"], r"^command line: stages\.0 must have either steps or epochs above 0, and has both"),
        (
            {},
            ["stages.0={crop: 8, batch: 1, epochs: .inf}"],
            r"stages\.0\.epochs is inf; it must be 0 or more, and less than 1e9",
        ),
        ({}, ["stages.0.steps=-1"], r"stages\.0\.steps is -1; it must be 0 or more"),
        ({"model_options": {"dim": {}}}, [], r"model_options\.dim: expected a name with a number, a word or a list"),
        ({}, ["model_options={1: 2}"], r"^command line: model_options\.1: expected"),
        ({"base": 3}, [], r"base: expected the name of a file, got int 3"),
        ({"base": "r.yaml"}, [], r"base: r\.yaml leads back to itself"),
        ({"base": "none.yaml"}, [], r"none\.yaml: cannot be read \(No such file.*\) \(the base of .*r\.yaml\)"),
        ({}, ["base=x.yaml"], r"base is read from a file"),
        ({}, ["lr=fast"], r"^command line: lr: expected float, got str 'fast'"),
        ({"lr": "fast"}, ["lrs=1", "seed=1"], r"^command line: unknown key lrs; valid: model"),
        ({"lr": "fast"}, ["seed=1"], r"r\.yaml: lr: expected float"),
        ({}, ["stages.1.crop=0"], r"^command line: stages\.1\.crop is 0; it must be at least 1"),
        ({}, ["stages.1={crop: 8}"], r"^command line: stages\.1: missing key batch"),
        ({"stages": [{"crop": 8}]}, ["stages.0.steps=1"], r"r\.yaml: stages\.0: missing key batch"),
        ({}, ["stages.1.size=3"], r"^command line: stages\.1: unknown key size"),
        ({"stages": [{"crop": 0, "batch": 1}]}, ["stages.0.steps=3"], r"r\.yaml: stages\.0\.crop is 0"),
        ({}, ["seed"], r"'seed': an override is key=value"),
        ({}, ["colour=1"], r"^command line: unknown key colour; valid: model"),
        ({}, ["stages.5.crop=1"], r"'stages.5.crop=1': .*r\.yaml has no place stages.5.crop"),
        ({}, ["a.b=1"], r"has no place a.b"),
        ({}, ["train=[a[0:3]]"], r"""'train=\[a\[0:3\]\]': the value is not YAML; .*: 'train=\["FOLDER\[0:3\]"\]'$"""),
    ],
)
def test_a_bad_recipe_is_one_line_with_file_and_key(write, changes, overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(write(**changes), overrides)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_said_twice(write):
    file = write()
    whole = file.read_text()
    lines = len(whole.splitlines())
    for more, told in {
        "model: serpent_l\n": rf"r\.yaml: line {lines + 1}: model is said twice; remove one of the two",
        "model_options:\n  dim: 8\n  'dim': 16\n": rf"r\.yaml: line {lines + 3}: dim is said twice",
    }.items():
        file.write_text(whole + more)
        with pytest.raises(UsageError, match=told):
            load_recipe(file)
    file.write_text(whole)
    with pytest.raises(UsageError, match=r"^'stages\.0={crop: 8, crop: 9}': line 1: crop is said twice"):
        load_recipe(file, ["stages.0={crop: 8, crop: 9}"])
    # What replaces a key that `<<` brings is no second one.
    assert load_recipe(file, ["stages=[&a {crop: 8, batch: 1, steps: 2}, {<<: *a, crop: 16}]"]).stages == [
        Stage(8, 1, 2),
        Stage(16, 1, 2),
    ]


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x00", b"", b"- 1"])
def test_files_that_are_no_recipes(tmp_path, content):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.yaml: (not YAML|expected keys and values)"):
        load_recipe(file)
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_replaces_keys_of_its_base(write, tmp_path):
    write()
    (tmp_path / "sub").mkdir()
    middle, top = tmp_path / "sub" / "middle.yaml", tmp_path / "top.yaml"
    middle.write_text("base: ../r.yaml\nlr: 2e-3\nmodel_options: {dim: 16, task: x}\n")
    top.write_text("base: sub/middle.yaml\nstages: [{crop: 8, batch: 4, epochs: 0.5}]\nout: e\n")
    recipe = load_recipe(top, ["model_options.dim=24"])
    assert (recipe.model, recipe.lr, recipe.out, recipe.stages) == ("serpent_b", 2e-3, "e", [Stage(8, 4, 0, 0.5)])
    assert recipe.model_options == {"dim": 24, "task": "x"}
    # What is saved beside a run is the whole of it.
    saved = tmp_path / "saved.yaml"
    saved.write_text(json.dumps(dataclasses.asdict(recipe)))
    assert load_recipe(saved) == recipe
    middle.write_text("base: ../top.yaml\n")
    with pytest.raises(UsageError, match=r"middle\.yaml: base: \.\./top\.yaml leads back to itself"):
        load_recipe(top)
    middle.write_text("base: ../r.yaml\nlr: -1.0\ncolour: 1\n")
    with pytest.raises(UsageError, match=r"middle\.yaml: unknown key colour"):
        load_recipe(top)
    middle.write_text("base: ../r.yaml\nlr: -1.0\n")
    with pytest.raises(UsageError, match=r"middle\.yaml: lr is -1\.0; it must be positive"):  # the file that says it
        load_recipe(top)


def test_epochs_are_steps_of_the_training_set():
    recipe = Recipe(**{**GOOD, "stages": []})
    assert recipe.steps_of(Stage(8, 16, steps=7), 1000) == 7
    assert recipe.steps_of(Stage(8, 16, epochs=20), 60000) == 75000
    assert recipe.steps_of(Stage(8, 16, epochs=0.1), 30) == 1


def test_a_key_that_an_older_version_did_not_write_had_its_default(write):
    recipe = load_recipe(write(stages=[{"crop": 64, "batch": 2, "steps": 3}]))
    saved = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert recipe.differs_from(saved) == []
    for key in [name for name in saved if name not in GOOD]:
        older = {name: value for name, value in saved.items() if name != key}
        assert recipe.differs_from(older) == []
        assert recipe.differs_from({**saved, key: "other"}) == [key]
    del saved["stages"][0]["epochs"]
    assert recipe.differs_from(saved) == []
    assert dataclasses.replace(recipe, ema=0.5, loss="l2").differs_from(GOOD | saved) == ["ema", "loss"]
    saved["stages"][0]["crop"] = 65
    assert recipe.differs_from(saved) == ["stages"]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), x, max_size=3)
)
NAMES = st.sampled_from([field.name for field in dataclasses.fields(Recipe)] + ["base", "colour"])
STAGES = st.lists(
    st.dictionaries(st.sampled_from(["crop", "batch", "steps", "epochs", "size"]), st.integers(-1, 9) | VALUES),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@example(changes={"model_options": {"\x1e": None}}, stages=None, key="model", text="")
@given(
    changes=st.dictionaries(NAMES, VALUES, max_size=2), stages=st.none() | STAGES, key=NAMES, text=st.text(max_size=9)
)
def test_whatever_a_recipe_holds_it_loads_or_is_one_line(tmp_path_factory, changes, stages, key, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    content = {**GOOD, **changes, **({"stages": stages} if stages is not None else {})}
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    for overrides in ([], [f"{key}={text}"], [f"{key}.0={text}"], [text]):
        try:
            recipe = load_recipe(file, overrides)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
            named = (str(file), "command line: ", *map(repr, overrides))
            assert overrides or str(error).startswith(str(file)) or "the base of" in str(error)
            assert str(error).startswith(named) or "the base of" in str(error)
        else:
            assert all(stage.crop > 0 and stage.batch > 0 for stage in recipe.stages)
            assert all(recipe.steps_of(stage, 7) > 0 for stage in recipe.stages)
            json.dumps(dataclasses.asdict(recipe))


NETWORKS = {
    **dict.fromkeys(["serpent_b", "serpent_l", "serpent_h", "swinir_b", "swinir_l"], 1e-3),
    **dict.fromkeys(["unet_32", "unet_128"], 5e-4),
    "restormer_24": 3e-4,
}


@pytest.mark.parametrize("size", [256, 512])
def test_the_recipes_of_the_paper(size):
    """Section 4.1 and appendix A; Restormer's rate as in design.md."""
    for task in ("deblur", "sr8"):
        for network, lr in NETWORKS.items():
            recipe = load_recipe(CONFIGS / "paper" / f"ffhq{size}.{task}.{network}.yaml")
            assert (recipe.model, recipe.task, recipe.lr) == (network, task, lr)
            assert recipe.out == f"runs/ffhq{size}.{task}.{network}"
            assert (recipe.train, recipe.val) == (
                [f"data/ffhq{size}.serpent[:60000]"],
                f"data/ffhq{size}.serpent[60000:]",
            )
            assert sum(stage.epochs for stage in recipe.stages) == 60
            crops = [size] if network.startswith("swinir") else [size // 4, size // 2, size]
            assert [stage.crop for stage in recipe.stages] == crops
            for stage in recipe.stages:
                assert recipe.steps_of(stage, 60000) * stage.batch == stage.epochs * 60000


def test_every_other_recipe_loads():
    files = [file for file in CONFIGS.rglob("*.yaml") if "base:" in file.read_text() or file.parent == CONFIGS]
    partial = {"ffhq256.yaml", "ffhq512.yaml"}  # and ffhq.yaml, which is the base of those
    assert len(files) == 2 * 2 * len(NETWORKS) + len(partial) + 26
    for file in files:
        if file.name not in partial:
            assert f"{load_recipe(file).model}." in f"{file.stem.split('.')[-1]}.{file.name}"
