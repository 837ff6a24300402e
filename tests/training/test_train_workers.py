"""Several processes on the CPU, over Gloo: the same weights as one, and none that hangs when another is gone."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import ENVIRONMENT, process
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.training import workers
from serpent_ir.training.workers import Workers
from training_files import draw_folders, recipe_file
from training_processes import (
    begin_apart,
    count_replays,
    fail_to_capture,
    finish,
    start,
    start_workers,
    stop_after_14_steps,
    train_twice,
)


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def test_two_processes_reach_the_weights_of_one(folders):
    changes = {"lr": 1e-4, "val_every": 3}
    assert finish(start(recipe_file(folders, "one", **changes))) == 0
    two = recipe_file(folders, "two", accumulate=2, **changes)
    assert [finish(process) for process in start_workers(two, 2, folders)] == [0, 0]
    one, both = (weights_of(folders / name) for name in ("one", "two"))
    for name in one:
        # Adam's steps are lr wide whatever the gradient is: one that is nearly zero may turn about by rounding.
        assert (one[name] - both[name]).abs().mean() < 2e-6, name
    rows = [
        [json.loads(line) for line in (folders / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for alone, together in zip(*rows, strict=True):
        for key in alone.keys() & {"loss", "psnr", "ssim", "input_psnr"}:
            assert together[key] == pytest.approx(alone[key], rel=1e-4), key
    assert "on 2 x cpu" in (folders / "said0").read_text()
    assert (folders / "said1").read_text() == ""
    alone = start(two, said=folders / "said", resume=True)
    assert finish(alone) == 0
    assert "step-00000010, made on 2 x cpu: here the same up to rounding" in (folders / "said").read_text()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def test_processes_that_trained_train_again(folders):
    file = recipe_file(folders, "one")
    both = start_workers(file, 2, folders, changes=(train_twice,))
    assert [finish(process) for process in both] == [0, 0]
    one, again = weights_of(folders / "one"), weights_of(folders / "one_again")
    assert [name for name in one if not torch.equal(one[name], again[name])] == []
    said = (folders / "said0").read_text()
    assert said.count("step 10/10  validation") == 2
    assert said.count("stages.0.batch is 3; it must be a multiple of 2") == 1


def test_processes_that_trained_on_cpus_do_not_train_on_gpus(monkeypatch):
    """Nor after something else ended the group: Accelerate would not take notice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for kind, told in {
        "cuda": "has trained on cuda, not cpu; train",
        "cpu": "has parted with the others; train",
    }.items():
        monkeypatch.setattr(workers, "_joint", workers._Joint(kind, None, None))
        with pytest.raises(UsageError, match=f"this process, one of several, {told} in a new one"):
            Workers("cpu")


def test_processes_that_are_not_told_where_to_meet(folders):
    run = process("train", recipe_file(folders), WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if not line.startswith("serpent: warning: ")]
    assert re.fullmatch(
        r"serpent: error: WORLD_SIZE is 2: no way to meet .*MASTER_ADDR.*; use torchrun, or unset WORLD_SIZE", line
    )
    assert not (folders / "run").exists()


def test_a_number_of_processes_that_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="RANK and WORLD_SIZE in the environment must be numbers"):
        Workers("cpu")


def test_processes_of_torchrun_train_as_those_of_these_tests(folders):
    file = recipe_file(folders, "forked", stages=[{"crop": 16, "batch": 2, "steps": 2}])
    assert [finish(worker) for worker in start_workers(file, 2, folders)] == [0, 0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "serpent_ir.cli", "train", str(file), f"out={folders}/run"]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 steps in 1 stage(s) on 2 x cpu") == 1, "one speaks"
    forked, launched = weights_of(folders / "forked"), weights_of(folders / "run")
    assert [name for name in forked if not torch.equal(forked[name], launched[name])] == []


def test_one_process_of_a_launcher_trains_to_the_bits_of_one_alone(folders):
    """It goes the way of several: collectives, words over Gloo."""
    assert finish(start(recipe_file(folders, "alone"))) == 0
    file = recipe_file(folders, "launched")
    (launched,) = start_workers(file, 1, folders, stop_after_minutes=0)
    assert finish(launched) == 0
    (launched,) = start_workers(file, 1, folders, resume=True)
    assert finish(launched) == 0
    alone, launched = weights_of(folders / "alone"), weights_of(folders / "launched")
    assert [name for name in alone if not torch.equal(alone[name], launched[name])] == []


def test_a_command_that_failed_on_several_gpus_ends_though_nccl_waits():
    """As far as a CPU can tell: as if NCCL were there, which does not come to an end at exit."""
    script = """if True:
        import atexit, time, torch, serpent_ir.training.run
        from serpent_ir.cli import app
        from serpent_ir.errors import SerpentError, UsageError
        torch.distributed.is_initialized = torch.cuda.is_initialized = lambda: True
        def train(*_, **__):
            raise SerpentError("another one is gone")
        serpent_ir.training.run.train = train
        atexit.register(time.sleep, 1000)
        print("not flushed")
        app(["train", "recipe.yaml"])
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "not flushed\n")
    assert ended.stderr == "serpent: error: another one is gone\n"


def test_a_capture_that_fails_in_one_process_and_weights_that_differ_change_nothing(folders):
    stages = [{"crop": 16, "batch": 4, "steps": 6}, {"crop": 32, "batch": 4, "steps": 6}]
    for name, changes in {"plain": (), "failing": (fail_to_capture, begin_apart)}.items():
        file = recipe_file(folders, name, stages=stages)
        (folders / f"{name}_said").mkdir()
        both = start_workers(file, 2, folders / f"{name}_said", changes=changes)
        assert [finish(process) for process in both] == [0, 0]
    plain, failing = weights_of(folders / "plain"), weights_of(folders / "failing")
    assert [name for name in plain if not torch.equal(plain[name], failing[name])] == []
    first, second = ((folders / "failing_said" / f"said{i}").read_text() for i in (0, 1))
    # At the second crop it is tried again.
    numbers = 1 + sum(weights.numel() for weights in plain.values())
    tried = [line for line in second.splitlines() if line.startswith("captures")]
    assert tried == ["captures gradients of 16", f"captures go of {numbers}", "captures gradients of 32"]
    warning = "the step runs without a CUDA graph, slower: operation not permitted when stream is capturing\n"
    assert (first.count(warning), second.count(warning)) == (0, 1)  # Python tells a warning once


def test_a_gpu_that_waits_for_a_dead_process_is_not_waited_for_for_ever(monkeypatch):
    class Never:
        def query(self):
            return False

    here = Workers("cpu")
    here.joined = True
    here._queued.append(Never())  # pyright: ignore
    here.catch_up(1)
    monkeypatch.setattr(workers, "PATIENCE", workers.timedelta(0))
    with pytest.raises(SerpentError, match="process 0 of 1: its GPU has waited for the others for 0 minutes; see what"):
        here.catch_up()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2])
def test_steps_of_processes_with_nccl_are_captured_and_train_as_one_alone(folders, count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices: NCCL needs one for each process")
    stages = [{"crop": 16, "batch": 4, "steps": 10}, {"crop": 32, "batch": 4, "steps": 8}]
    options = {"stages": stages, "val_every": 100, "device": "cuda", "model_options": {}, "lr": 1e-4}
    options["precision"] = "float32"
    assert finish(start(recipe_file(folders, "alone", **options), fresh=True), seconds=400) == 0

    def run(name: str, *changes, **more) -> None:
        file, changes = recipe_file(folders, name, **options), (count_replays, *changes)
        for each in start_workers(file, count, folders, changes=changes, fresh=True, **more):
            assert finish(each, seconds=200) == 0

    run("joined")
    run("stopped", stop_after_14_steps)
    run("stopped", resume=True)
    for i in range(count):
        said = (folders / f"said{i}").read_text()
        assert "without a CUDA graph" not in said
        # Three calls of a part at each shape run as they are; the last run begins at step 14.
        told = [line.partition("replayed: ")[2] for line in said.splitlines() if "replayed: " in line]
        replayed = [json.loads(counts) for counts in told]
        assert replayed == [
            {"gradients": 7 + 5, "go": 15},
            {"gradients": 7 + 1, "go": 11},
            {"gradients": 1, "go": 1},
        ]
    assert "the time is over at step 14 of 18" in (folders / "said0").read_text()
    alone = torch.cat([x.flatten() for x in weights_of(folders / "alone").values()])
    for name in ("joined", "stopped"):
        difference = torch.cat([x.flatten() for x in weights_of(folders / name).values()]) - alone
        print(f"{name}: {int((difference != 0).sum())} of {len(alone)} weights differ, by {difference.abs().max():.3g}")
        # The sums of one process are its own. Two add theirs, and Adam's steps are lr wide whatever the gradient is.
        assert difference.norm() < (1e-5 if count == 1 else 1e-3) * alone.norm(), name


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_ends_the_others_with_a_message(folders, killed):
    endless = [{"crop": 16, "batch": 4, "steps": 100_000}]
    workers = start_workers(recipe_file(folders, stages=endless, val_every=100_000), 2, folders)
    until = time.monotonic() + 60
    while not (folders / "run" / "log.jsonl").exists() or not (folders / "run" / "log.jsonl").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    workers[killed].kill()
    assert finish(workers[killed]) == -9
    assert finish(workers[1 - killed], seconds=60) == 1
    said = (folders / f"said{1 - killed}").read_text().splitlines()[-1]
    assert said.startswith(f"process {1 - killed} of 2: another one is gone (")
    assert said.endswith("see what it said, then go on with --resume")
    assert "pair.cc" not in said, "where in Gloo it was found is of no use to a person"


def test_what_one_process_finds_ends_all(folders):
    (folders / "val" / "sub" / "1.png").write_bytes(b"")  # the second image, which the second process reads
    workers = start_workers(recipe_file(folders), 2, folders)
    assert [finish(process) for process in workers] == [1, 1]
    assert "1.png: " in (folders / "said1").read_text()
    assert "process 0 of 2: another one is gone" in (folders / "said0").read_text()


def test_a_batch_that_cannot_be_shared_is_refused(folders):
    workers = start_workers(recipe_file(folders, stages=[{"crop": 16, "batch": 3, "steps": 1}]), 2, folders)
    assert [finish(process) for process in workers] == [1, 1]
    assert "stages.0.batch is 3; it must be a multiple of 2: 2 process(es) x" in (folders / "said0").read_text()
