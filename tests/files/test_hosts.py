"""Hosts that share a batch: two groups of processes, numbered as launchers on two hosts number them."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from serpent_ir import create_model

HOSTS, EACH, IMAGES = 2, 2, 11

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "serpent_ir.__main__", "serpent_ir.files", "torch.distributed"])


@pytest.fixture
def call(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for index in range(IMAGES):
        Image.new("RGB", (12, 9), (20 * index, 90, 90)).save(f"photos/{index:02}.png")
    save_file(create_model("serpent_b").state_dict(), "w.safetensors", {"network": "serpent_b", "task": "deblur"})
    return ["restore", "photos", "-o", "out", "--weights", "w.safetensors", "--json", "--manifest", "done"]


def run_on_hosts(call: list[str], *, dies: int = -1) -> list[tuple[int | None, str, list[str]]]:
    """Status, stdout and lines of stderr of each process, in the order of ranks; the one numbered `dies` is killed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    started = []
    for rank in range(HOSTS * EACH):
        numbers = {"RANK": rank, "WORLD_SIZE": HOSTS * EACH, "LOCAL_RANK": rank % EACH, "LOCAL_WORLD_SIZE": EACH}
        environment = {**place, **{name: str(number) for name, number in numbers.items()}}
        process = _context.Process(target=command, args=(Path.cwd(), environment, call, rank == dies))
        process.start()
        started.append(process)
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
    told = [[Path(f"{kind}{rank}").read_text() for kind in ("out", "err")] for rank in range(HOSTS * EACH)]
    return [(process.exitcode, out, err.splitlines()) for process, (out, err) in zip(started, told, strict=True)]


def command(folder: Path, environment: dict[str, str], call: list[str], dies: bool) -> None:
    """`serpent` in a process of its own, which may be killed before it writes its second image."""
    from serpent_ir.__main__ import main
    from serpent_ir.files import restore

    os.chdir(folder)
    for name, target in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{name}{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.environ.update(environment)
    torch.set_num_threads(1)
    write, left = restore.Restored.write, [1]

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    if dies:
        restore.Restored.write = dying
    sys.argv = ["serpent", *call]
    main()


def test_two_hosts_share_a_batch_and_go_on_where_a_process_was_killed(call):
    ended = run_on_hosts(call, dies=3)
    assert [status for status, _, _ in ended] == [1, 1, 1, -signal.SIGKILL]
    for rank, (_, told, said) in enumerate(ended[:3]):
        assert said[-1] == (
            f"serpent: error: process {rank} of 4: another one is gone, and its share is not done; call again with the "
            "same --manifest, or with --skip-existing, for the rest"
        )
        assert not [line for line in said if "Traceback" in line]
        assert [Path(row["source"]).stem for row in json.loads(told)["images"]] == [
            f"{index:02}" for index in range(rank, IMAGES, 4)
        ]
    there = sorted(path.name for path in Path("out").iterdir())
    assert there == [f"{index:02}.png" for index in range(IMAGES) if index != 7]  # its second one, and no part of it
    for name in there:
        with Image.open(f"out/{name}") as image:
            image.load()
    ended = run_on_hosts(call)
    assert [(status, bool(told)) for status, told, _ in ended] == [(0, True), (0, False), (0, False), (0, False)]
    told = json.loads(ended[0][1])
    assert (told["restored"], told["failed"], told["skipped"]) == (1, 0, IMAGES - 1)
    lines = [line for rank in range(4) for line in Path(f"done.rank{rank}").read_text().splitlines()]
    assert sorted(Path(json.loads(line)["target"]).stem for line in lines) == [f"{i:02}" for i in range(IMAGES)]
