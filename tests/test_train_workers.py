"""Several processes on the CPU, over Gloo: the same weights as one, and none that hangs when another is gone."""

import json
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training_files import draw_folders, recipe_file
from training_processes import finish, start


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def start_workers(file: Path, count: int, folder: Path, **options):
    """What `torchrun` does: so many processes with their numbers in the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    address |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [
        start(file, said=folder / f"said{i}", environment={**address, "RANK": str(i), "LOCAL_RANK": str(i)}, **options)
        for i in range(count)
    ]


def test_two_processes_reach_the_weights_of_one(folders):
    changes = {"lr": 1e-4, "val_every": 3}
    assert finish(start(recipe_file(folders, "one", **changes))) == 0
    two = recipe_file(folders, "two", accumulate=2, **changes)
    assert [finish(process) for process in start_workers(two, 2, folders)] == [0, 0]
    one, both = (load_file(folders / name / "weights.safetensors") for name in ("one", "two"))
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
