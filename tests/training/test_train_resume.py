"""Nothing is lost: kills at any moment, damaged checkpoints, full disks, signals, losses that are not finite."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.train import Trainer, train
from serpent_ir.training import log
from serpent_ir.training.checkpoints import Checkpoints
from serpent_ir.training.lock import own_folder
from serpent_ir.training.recipe import load_recipe
from serpent_ir.training.stopping import Stop
from training_files import TINY, draw_folders, draw_image, logged, quiet_trainer, recipe_file, rows_of
from training_processes import MOMENTS, finish, start

PAPER = Path(__file__).parents[2] / "configs" / "paper" / "ffhq256.deblur.serpent_b.yaml"


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def final_state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, and the averaged weights."""
    newest = max((out / "checkpoints").glob("step-*[0-9]"))
    files = [*newest.glob("*.safetensors"), out / "weights.safetensors"]
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load(file.read_bytes()).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def paper_recipe(root: Path, out: str) -> list[str]:
    """What makes the paper's recipe one of seconds: few images in FFHQ's layout, small crops, a tiny network."""
    for number in range(7):
        (root / "ffhq" / "00000").mkdir(parents=True, exist_ok=True)
        draw_image(32, 32, number).save(root / "ffhq" / "00000" / f"{number:05d}.png")
    stages = [{"crop": crop, "batch": 2, "epochs": 3} for crop in (8, 16, 32)]
    changes = {"train": [f"{root}/ffhq[:5]"], "val": f"{root}/ffhq[5:]", "out": str(root / out), "stages": stages}
    changes |= {"val_every": 3, "warmup": 4, "device": "cpu", "model_options": TINY}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def test_the_papers_recipe_killed_20_times_ends_with_the_same_bits(tmp_path):
    draw = random.Random(5)
    assert finish(start(PAPER, *paper_recipe(tmp_path, "whole"))) == 0
    whole = final_state(tmp_path / "whole")
    assert {key.split(".")[0] for key in whole} == {"adam", "average", "network", "generators", "weights"}
    kills, runs = 0, 0
    while kills < 20:
        runs += 1
        overrides = paper_recipe(tmp_path, f"killed{runs}")
        out, best, status = tmp_path / f"killed{runs}", 0, -signal.SIGKILL
        while status:
            # By turns at any time, and at a point of writing or removing a checkpoint.
            die = (draw.choice(MOMENTS), draw.randrange(20)) if kills % 2 else None
            process = start(PAPER, *overrides, resume=True, die=die if kills < 20 else None)
            if not die and kills < 20:
                process.join(draw.uniform(0.05, 0.8))
                process.kill()
            status = finish(process)
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            found = Checkpoints(out / "checkpoints", 3).newest(lambda line: None)
            step = found.step if found else 0
            assert step >= best, "a checkpoint was lost"
            best = step
        assert_same_bits(final_state(out), whole)
        assert logged(out) == logged(tmp_path / "whole") == sorted([3, 6, 8, 9, 12, 15, 16, 18, 21, 24] * 2)
        assert not [*out.rglob("*.part"), *out.rglob("*.damaged")]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folders):
    file = recipe_file(folders)
    train(file)
    whole = final_state(folders / "run")
    steps = sorted((folders / "run" / "checkpoints").iterdir())
    assert [path.name for path in steps] == ["step-00000006", "step-00000008", "step-00000010"]
    content = (steps[2] / "network.0.safetensors").read_bytes()
    (steps[2] / "network.0.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
    manifest = steps[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 8', '"step": 9'))
    (folders / "run" / "weights.safetensors").unlink()
    log = folders / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 11, "lo')  # a row that a kill cut short
    said: list[str] = []
    trainer = Trainer(load_recipe(file), say=said.append)
    trainer.run(resume=True)
    assert "step-00000010: network.0.safetensors is damaged (its hash differs); going on from step-00000006" in said[0]
    assert "step-00000008: manifest.json is damaged; going on from step-00000006" in said[1]
    assert "going on from step 6 of" in said[2]
    assert_same_bits(final_state(folders / "run"), whole)
    assert logged(folders / "run") == [4, 4, 6, 6, 8, 8, 10, 10]
    for path in (folders / "run" / "checkpoints").glob("step-*/average.0.safetensors"):
        path.unlink()
    with pytest.raises(
        SerpentError, match=r"step-00000010: average\.0\.safetensors cannot be read .* no other is whole"
    ):
        train(file, resume=True)


def test_tensors_and_json_alone_are_read(folders):
    """A pickle in a checkpoint is never opened, whatever its manifest says."""
    file = recipe_file(folders)
    quiet_trainer(file).run(stop_after_minutes=0)
    (part,) = (folders / "run" / "checkpoints").glob("*/network.0.safetensors")
    torch.save({"network": torch.zeros(1)}, part)
    with pytest.raises(SerpentError, match="its hash differs"):
        train(file, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(folders):
    file = recipe_file(folders)
    trainer = quiet_trainer(file)
    trainer.run(stop_after_minutes=0)
    before = Checkpoints(folders / "run" / "checkpoints", 3).newest(lambda line: None)
    assert before is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = quiet_trainer(file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel refuses a longer file, as on a full disk
    try:
        with pytest.raises(
            SerpentError, match=r"step-00000004: cannot be written \(File too large\); step-00000000 is"
        ):
            trainer.run(resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = Checkpoints(folders / "run" / "checkpoints", 3).newest(lambda line: None)
    assert after is not None
    assert after.path == before.path
    assert not list((folders / "run").rglob("*.part"))
    assert quiet_trainer(file).run(resume=True).exists()


@pytest.mark.parametrize("full", ["log.jsonl", "weights.safetensors", "run.png"])
def test_other_files_on_a_full_disk_stop_training_too(folders, monkeypatch, full):
    trainer = quiet_trainer(recipe_file(folders))
    opened, replaced = Path.open, Path.replace

    def refuse(path, mode="r", **options):
        if full in path.name and mode != "r" and trainer.step:
            raise OSError(28, "No space left on device")
        return opened(path, mode, **options)

    def refuse_to_replace(path, target):
        if full in target.name and trainer.step:
            raise OSError(28, "No space left on device")
        return replaced(path, target)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "replace", refuse_to_replace)
    with pytest.raises(SerpentError, match=rf"{full}: cannot be written \(No space left on device\); make room"):
        trainer.run()


def test_pictures_on_a_full_disk_stop_training_too(folders, monkeypatch):
    def refuse(path, picture):
        raise ImageError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(log, "write_image", refuse)
    with pytest.raises(SerpentError, match=r"4\.png: cannot be written: No space left on device; make room and go on"):
        quiet_trainer(recipe_file(folders)).run()


def test_the_same_weights_are_files_of_the_same_bytes(folders):
    files = [quiet_trainer(recipe_file(folders, out)).run() for out in ("run", "again")]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        about = {"network": "serpent_b", "options": '{"blocks": [1, 1], "dim": 8}', "task": "deblur"}
        found = file.metadata()
        assert len(found.pop("serpent_sha256")) == 64
        assert found == {**about, "step": "10", "steps": "[6, 4]"}


def test_scores_of_other_images_are_not_compared(folders):
    quiet_trainer(recipe_file(folders)).run(stop_after_minutes=0)
    score = folders / "run" / "checkpoints" / "step-00000000" / "score.json"
    easy = json.loads(score.read_text()) | {"psnr": 99.0}
    assert (easy["val"], easy["val_images"]) == (str(folders / "val"), 2)
    score.write_text(json.dumps(easy))
    trainer = quiet_trainer(recipe_file(folders, keep=1, val=str(folders / "train")))
    assert trainer.checkpoints.best() is None
    trainer.run(resume=True)
    assert not score.exists()
    assert trainer.checkpoints.best() in trainer.checkpoints.paths()


def test_a_step_that_is_saved_is_not_saved_again(folders):
    file, checkpoints = recipe_file(folders, keep=1), folders / "run" / "checkpoints"
    quiet_trainer(file).run(stop_after_minutes=0)

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in checkpoints.rglob("*")}

    before, rows = files(), logged(folders / "run")
    assert (checkpoints / "step-00000000" / "score.json") in before
    (folders / "run" / "weights.safetensors").unlink()
    quiet_trainer(file).run(resume=True, stop_after_minutes=0)
    assert files() == before
    assert logged(folders / "run") == rows, "it was validated again"
    assert (folders / "run" / "weights.safetensors").exists()


def wait_for_row(log: Path, rows: int) -> None:
    until = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) <= rows:
        assert time.monotonic() < until, "it does not train"
        time.sleep(0.02)


def test_signals_save_and_the_run_goes_on(folders):
    endless = [{"crop": 16, "batch": 4, "steps": 100_000}]
    file, out = recipe_file(folders, stages=endless, val_every=100_000), folders / "run"
    command = [sys.executable, "-m", "serpent_ir.cli", "train", str(file)]
    by_command = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_row(out / "log.jsonl", 0)
    by_command.send_signal(signal.SIGINT)
    _, said = by_command.communicate(timeout=60)
    assert by_command.returncode == 130, said
    assert "Traceback" not in said
    assert re.fullmatch(
        r"serpent: stopped by Ctrl-C at step \d+ of 100000; .*/run is saved; go on with --resume", last_line(said)
    )
    process = start(file, said=folders / "said", resume=True)
    wait_for_row(out / "log.jsonl", len(logged(out)))
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    said = (folders / "said").read_text()
    assert "going on from step" in said
    assert "stopped by SIGTERM at step" in last_line(said)
    found = Checkpoints(out / "checkpoints", 3).newest(lambda line: None)
    assert found is not None
    assert found.step >= logged(out)[-1] > 50


def test_ctrl_c_counts_twice_after_some_seconds(monkeypatch):
    now, before = [100.0], signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    monkeypatch.setattr("serpent_ir.training.stopping.time.monotonic", lambda: now[0])
    stop = Stop(None)
    with stop.listening():
        assert stop.asked() == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a launcher hands on what the terminal already sent
        signal.raise_signal(signal.SIGINT)
        assert stop.asked() == signal.SIGINT
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_time_limit_ends_a_run_in_order(folders):
    said: list[str] = []
    trainer = Trainer(load_recipe(recipe_file(folders)), say=said.append)
    weights = trainer.run(stop_after_minutes=0)
    assert weights.exists()
    assert said[-1].startswith("the time is over at step 0 of 10")
    train(recipe_file(folders), resume=True, stop_after_minutes=60)
    assert logged(folders / "run")[-1] == 10


def test_a_checkpoint_is_written_every_so_often(folders, monkeypatch):
    whole = quiet_trainer(recipe_file(folders, "whole"))
    whole.run()
    monkeypatch.setattr("serpent_ir.training.stopping.SAVE_SECONDS", 0.0)
    written: list[int] = []
    trainer = quiet_trainer(recipe_file(folders))
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda: (written.append(trainer.step), save())[1])
    trainer.run()
    assert written == list(range(1, 11))
    assert sorted({*logged(folders / "run")}) == written
    times = [json.loads((path / "manifest.json").read_text())["seconds"] for path in trainer.checkpoints.paths()]
    assert times[0] > 0  # what training had taken until then is not lost with the next kill
    assert times == sorted(times)
    assert_same_bits(final_state(folders / "run"), final_state(folders / "whole"))


def test_two_trainings_at_once_do_not_share_a_folder(folders):
    file = recipe_file(folders)
    quiet_trainer(file).run(stop_after_minutes=0)
    half = folders / "run" / "checkpoints" / "step-00000004.part"
    with own_folder(folders / "run"):
        half.mkdir()  # the other one is writing it
        with pytest.raises(SerpentError, match=r"run: another training is at work there; stop it, or choose"):
            quiet_trainer(file).run(resume=True)
        assert half.exists()
    assert quiet_trainer(file).run(resume=True).exists()


def test_a_folder_that_holds_a_run_is_left_alone(folders):
    file = recipe_file(folders)
    said: list[str] = []
    Trainer(load_recipe(file), say=said.append).run(resume=True, stop_after_minutes=0)
    assert "holds no checkpoint to go on from; starting anew" in said[0]
    with pytest.raises(UsageError, match=r"run: holds a run; go on with --resume, or choose another out="):
        train(file)
    (folders / "run" / "checkpoints").rename(folders / "aside")
    for options, said_of_it in [
        ({}, "holds a run"),
        ({"resume": True}, "holds weights, and no checkpoint to go on from"),
    ]:
        with pytest.raises(UsageError, match=said_of_it):
            train(file, **options)
    (folders / "aside").rename(folders / "run" / "checkpoints")
    for change in ({"lr": 0.5}, {"stages": [{"crop": 16, "batch": 4, "steps": 7}]}):
        with pytest.raises(SerpentError, match=rf"holds a run of another recipe \({next(iter(change))}\)"):
            train(recipe_file(folders, **change), resume=True)
    (folders / "train" / "0.png").unlink()
    with pytest.raises(SerpentError, match="was trained on 5 images, and the 4 of train now are others"):
        train(recipe_file(folders), resume=True)


def test_a_run_goes_on_elsewhere(folders):
    file = recipe_file(folders)
    quiet_trainer(file).run(stop_after_minutes=0)
    (folders / "run").rename(folders / "moved")
    (folders / "train").rename(folders / "images")
    manifest = next((folders / "moved").rglob("manifest.json"))
    assert json.loads(manifest.read_text())["workers"] == "cpu"
    said: list[str] = []
    moved = recipe_file(folders, "moved", train=[str(folders / "images")], keep=1, recompute=True)
    Trainer(load_recipe(moved), say=said.append).run(resume=True)
    assert "train moved: the same images are expected there" in said[0]


def test_steps_that_are_not_finite_are_skipped_and_end_training(folders, monkeypatch):
    file = recipe_file(folders, stages=[{"crop": 16, "batch": 4, "steps": 30}])
    poisoned: list[int] = []
    step = Trainer.train_step

    def poison(trainer, degraded, clean):
        degraded[0, 0, 0, 0] = float("nan") if trainer.step in poisoned else 0.0
        step(trainer, degraded, clean)

    monkeypatch.setattr(Trainer, "train_step", poison)
    trainer = quiet_trainer(file)
    batches = trainer.batches()
    trainer.train_step(*next(batches))
    weights = {name: x.clone() for name, x in trainer.network.state_dict().items()}
    adam = trainer.optimizer.state_dict()["state"]
    adam = {(i, name): x.clone() for i, state in adam.items() for name, x in state.items()}
    average = [x.clone() for x in trainer.average.parameters()]
    assert not any(x.requires_grad for x in average), "autograd follows the average"
    assert any(not torch.equal(a, b) for a, b in zip(average, trainer.network.parameters(), strict=True))
    poisoned[:] = [0]
    trainer.train_step(*next(batches))
    assert all(torch.equal(a, b) for a, b in zip(average, trainer.average.parameters(), strict=True))
    assert all(torch.equal(weights[name], x) for name, x in trainer.network.state_dict().items())
    now = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(x, now[i][name]) for (i, name), x in adam.items())
    assert trainer.update.tally.take()[1] == 1

    trainer = quiet_trainer(file)
    poisoned[:] = [5, 6, 7, 8, 15, 16, 17, 18, 19, 20]
    with pytest.raises(SerpentError, match=r"not finite in 5 steps in a row, by step 20; .*step-00000020; lower lr"):
        trainer.run()
    skipped = [row["skipped"] for row in rows_of(folders / "run") if "skipped" in row]
    assert sum(skipped) == 9
    found = Checkpoints(folders / "run" / "checkpoints", 3).newest(lambda line: None)
    assert found is not None
    assert all(x.isfinite().all() for group in found.groups.values() for x in group.values())
