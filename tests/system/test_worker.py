"""A process that works for another, through everything that its tasks do."""

import os
import time
from pathlib import Path

import pytest

from serpent_ir.errors import SerpentError
from serpent_ir.system.worker import Worker


def quick(path: Path) -> str:
    return path.name


def slow(path: Path) -> None:
    time.sleep(60)


def refuses(path: Path) -> None:
    raise SerpentError(f"{path}: is no image")


def breaks(path: Path) -> None:
    raise RuntimeError("a secret of the server")


def dies(path: Path) -> None:
    os._exit(9)


def test_the_worker_outlives_what_its_images_do(capfd):
    worker = Worker()
    photo = Path("/a/server/folder/photo.png")
    try:
        assert worker(quick, photo, seconds=60) == "photo.png"
        first = worker._process
        with pytest.raises(SerpentError, match=r"^photo\.png: is no image$"):  # not where the server keeps it
            worker(refuses, photo, seconds=60)
        with pytest.raises(SerpentError, match="failed for a reason of its own") as failure:
            worker(breaks, photo, seconds=60)
        assert "secret" not in str(failure.value)
        assert worker(quick, photo, seconds=60) == "photo.png"
        assert worker._process is first
        with pytest.raises(SerpentError, match=r"took longer than 0\.2 s"):
            worker(slow, photo, seconds=0.2)
        assert not first.is_alive()
        with pytest.raises(SerpentError, match="did not fit in memory"):
            worker(dies, photo, seconds=60)
        assert worker(quick, photo, seconds=60) == "photo.png"
    finally:
        worker.stop()
    assert "a secret of the server" in capfd.readouterr().err
