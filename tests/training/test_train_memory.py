"""Memory that ends, wherever it does, is one line with a remedy that helps; and the run goes on."""

import signal

import pytest
import torch

from serpent_ir.errors import OutOfRoomError
from serpent_ir.train import Trainer, plan, train
from serpent_ir.training.step import GraphedStep
from serpent_ir.training.stopping import StoppedError
from training_files import draw_folders, logged, quiet_trainer, recipe_file
from training_processes import finish, plan_where_the_second_has_no_room, start_workers


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_step_that_does_not_fit_names_its_stage_and_what_makes_it_smaller(folders, monkeypatch):
    file, step = recipe_file(folders), Trainer.train_step

    def until_step_7(trainer, *batch):
        (full if trainer.step == 7 else step)(trainer, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", until_step_7)
        told = r"^stages\.1: crop 32 with batch 4 does not fit .* --resume and accumulate=2 or recompute=true$"
        with pytest.raises(OutOfRoomError, match=told):
            quiet_trainer(file).run()
    quiet_trainer(file, "accumulate=2").run(resume=True)
    assert logged(folders / "run")[-1] == 10


@pytest.mark.parametrize("where", ["starting_network", "TrainingSet", "Step", "own_stream"])
@pytest.mark.parametrize("do", [train, plan])
def test_what_is_too_large_to_begin_with_is_said(folders, monkeypatch, where, do):
    module = "serpent_ir.training.run" if where == "own_stream" else "serpent_ir.training.trainer"
    monkeypatch.setattr(f"{module}.{where}", full)
    with pytest.raises(OutOfRoomError, match=r"^serpent_b and the images of train do not fit in the memory of cpu; cl"):
        do(recipe_file(folders))


def test_a_validation_that_does_not_fit_names_its_image(folders, monkeypatch):
    file = recipe_file(folders)
    told = r"^.*val/0\.png: validation of its 48x40 px does not fit in the memory of cpu; .* smaller images in val=$"
    with monkeypatch.context() as patched:
        patched.setattr("serpent_ir.evaluate.run_network", full)
        for resume in (False, True):  # with which the validation comes again
            with pytest.raises(OutOfRoomError, match=told):
                train(file, resume=resume)
        with pytest.raises(OutOfRoomError, match=told):
            plan(file)
    train(file, resume=True)
    assert logged(folders / "run") == [4, 4, 6, 6, 8, 8, 10, 10]


def test_ctrl_c_is_a_wish_while_a_validation_comes_again(folders, monkeypatch):
    file = recipe_file(folders)
    with monkeypatch.context() as patched, pytest.raises(OutOfRoomError):
        patched.setattr("serpent_ir.training.validation.evaluate_image", full)
        train(file)
    validate = Trainer._validate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        validate(*args)

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    with pytest.raises(StoppedError, match="stopped by Ctrl-C at step 4 of 10"):
        train(file, resume=True)
    assert logged(folders / "run") == [4, 4]


def test_nothing_is_left_of_a_capture_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", object)
    monkeypatch.setattr("serpent_ir.training.step.capture", lambda run: (object(), run()))
    calls: list[int] = []
    step = GraphedStep(lambda x: full() if len(calls) == GraphedStep.WARMUP else calls.append(1))
    for _ in range(GraphedStep.WARMUP):
        step(torch.ones(2))
    for _ in range(2):  # rather than replay half a step
        with pytest.raises(torch.OutOfMemoryError):
            step(torch.ones(2))
        assert (step.graph, step.inputs) == (None, [])


def test_processes_agree_on_what_does_not_fit_in_one_of_them(folders):
    stages = [{"crop": crop, "batch": 4, "steps": 1} for crop in (16, 32, 40)]
    file = recipe_file(folders, stages=stages)
    workers = start_workers(file, 2, folders, changes=(plan_where_the_second_has_no_room,))
    assert [finish(process, seconds=60) for process in workers] == [0, 0]
    said = (folders / "said0").read_text().splitlines()
    assert said == ["16: fits", "32: does not fit: accumulate=2 or recompute=true", "40: fits"]
