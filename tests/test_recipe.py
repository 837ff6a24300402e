import pytest
import yaml

from serpent_ir.errors import UsageError
from serpent_ir.recipe import Stage, load_recipe

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
    recipe = load_recipe(write(), ["lr=5e-4", "stages.1.steps=7", "train=[x]", "seed=3"])
    assert recipe.lr == 5e-4
    assert recipe.stages == [Stage(64, 2, 3), Stage(128, 1, 7)]
    assert recipe.train == ["x"]
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
        ({}, ["seed"], r"'seed': an override is key=value"),
        ({}, ["colour=1"], r"unknown key colour; valid: model"),
        ({}, ["stages.5.crop=1"], r"'stages.5.crop=1': .*r\.yaml has no place stages.5.crop"),
        ({}, ["a.b=1"], r"has no place a.b"),
    ],
)
def test_a_bad_recipe_is_one_line_with_file_and_key(write, changes, overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(write(**changes), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x00", b"", b"- 1"])
def test_files_that_are_no_recipes(tmp_path, content):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.yaml: (not YAML|expected keys and values)"):
        load_recipe(file)
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")
