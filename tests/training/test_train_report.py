"""What a run shows; where it was interrupted, every row, picture and event once."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from serpent_ir.train import Trainer
from serpent_ir.training.checkpoints import Checkpoints
from serpent_ir.training.log import RunLog
from serpent_ir.training.recipe import load_recipe
from training_files import draw_folders, logged, quiet_trainer, recipe_file


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def shown(run: Path) -> dict[str, list[int]]:
    """The steps at which TensorBoard shows loss and PSNR."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {key: [event.step for event in events.Scalars(key)] for key in ("loss", "psnr")}


def test_crops_from_much_larger_images_are_told_of(folders):
    for crop, told in {19: True, 20: False}.items():
        recipe = load_recipe(recipe_file(folders, f"crop{crop}", stages=[{"crop": crop, "batch": 1, "steps": 1}]))
        said = []
        Trainer(recipe, said.append).run(stop_after_minutes=0)
        line = (
            f"crops of {crop} px are cut from images of 40 px and more, which are not reduced; to reduce them: serpent"
        )
        assert any(text.startswith(line) for text in said) == told
        assert any("not reduced" in text for text in said) == told


@pytest.mark.parametrize("lost", ["row", "pictures", "score"])
def test_a_validation_that_a_kill_cut_short_is_made_again(folders, monkeypatch, lost):
    file, out = recipe_file(folders), folders / "run"
    owner, name = (Checkpoints, "score") if lost == "score" else (RunLog, lost)
    write, left = getattr(owner, name), [3 if lost == "row" else 1]

    def die(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, die)
        quiet_trainer(file, tensorboard=True).run()
    assert not (out / "checkpoints" / "step-00000006" / "score.json").exists()
    quiet_trainer(file, tensorboard=True).run(resume=True)
    assert logged(out) == [4, 4, 6, 6, 8, 8, 10, 10]
    assert shown(out) == {"loss": [4, 6, 8, 10], "psnr": [4, 6, 8, 10]}
    assert (out / "pictures" / "step-00000006.png").exists()
    assert (out / "checkpoints" / "step-00000006" / "score.json").exists()


def test_events_of_an_interrupted_run_are_not_shown_twice(folders, monkeypatch):
    file, write, left = recipe_file(folders), Trainer._write_weights, [2]

    def die(*of_the_weights):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*of_the_weights)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_write_weights", die)
        quiet_trainer(file, tensorboard=True).run()
    (folders / "run" / "checkpoints" / "step-00000008").rename(folders / "lost")  # whose row was logged
    quiet_trainer(file, tensorboard=True).run(resume=True)
    assert shown(folders / "run") == {"loss": [4, 6, 8, 10], "psnr": [4, 6, 8, 10]}
