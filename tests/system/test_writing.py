"""Files that are whole or not there: several writers, errors, kills, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from commands import ENVIRONMENT
from serpent_ir.system import whole_file as writing
from serpent_ir.system.whole_file import whole_file

WRITER = """
import os, sys
from pathlib import Path
from serpent_ir.system.whole_file import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(path: Path) -> subprocess.Popen[bytes]:
    """A process that writes `path` until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout
    assert process.stdout.readline() == b"writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_path_make_two_whole_files(tmp_path):
    path = tmp_path / "x"
    with whole_file(path) as first:
        first.write(b"first" * 1000)
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 1000
    assert names(tmp_path) == ["x"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]
    with pytest.raises(OSError, match="No such file"), whole_file(tmp_path / "none" / "x"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX tell who is dead")
def test_the_next_writer_removes_what_a_kill_left_and_nothing_else(tmp_path, monkeypatch):
    killed, alive = writer(tmp_path / "a"), writer(tmp_path / "b")
    with killed, alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = names(tmp_path)
        assert len(left) == 2
        own = next(name for name in left if f"-{killed.pid}-" in name)
        kept = {
            own.replace("serpent-", "serpent-another.host."): b"of a host whose locks are not seen here",
            ".hidden.tmp": b"somebody's",
            "a.part": b"somebody's",
        }
        for name, content in kept.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / f"{writing._PREFIX}link{writing._SUFFIX}").symlink_to("a.part")
        (tmp_path / f"{writing._PREFIX}folder{writing._SUFFIX}").mkdir()
        writing._searched.clear()
        with whole_file(tmp_path / "c") as file:
            file.write(b"c")
        there = names(tmp_path)
        assert own not in there
        assert set(left) - {own} < set(there)  # whose writer lives
        assert {*kept, "c"} < set(there)
        assert (tmp_path / "a.part").read_bytes() == b"somebody's"
        assert alive.stdin
        alive.stdin.close()
        assert alive.wait() == 0
    assert (tmp_path / "b").read_bytes() == b"half"


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX tell who is dead")
def test_a_new_file_that_somebody_cleans_up_is_made_again(tmp_path, monkeypatch):
    """Between the creation of a file and its lock it looks like one that a kill left."""
    lock, removed = writing._lock, []

    def late(file: int) -> bool:
        if not removed:
            (path,) = tmp_path.iterdir()
            removed.append(path)
            writing._remove_if_unlocked(path)
        return lock(file)

    monkeypatch.setattr(writing, "_lock", late)
    with whole_file(tmp_path / "x") as file:
        file.write(b"x")
    assert removed
    assert names(tmp_path) == ["x"]


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX tell who is dead")
def test_a_disk_without_locks_is_written_to(tmp_path, monkeypatch):
    def none(file: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(writing.fcntl, "flock", none)
    left = tmp_path / f"{writing._PREFIX}1{writing._SUFFIX}"
    left.write_bytes(b"perhaps somebody writes it")
    with whole_file(tmp_path / "x") as file:
        file.write(b"x")
    assert names(tmp_path) == [left.name, "x"]


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX tell who is dead")
def test_temporary_folders_that_a_kill_left_are_removed(tmp_path, monkeypatch):
    code = """
import sys
from serpent_ir.system.whole_file import temporary_folder
with temporary_folder("x") as folder:
    (folder / "file").write_bytes(b"x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    start = [sys.executable, "-c", code]
    with (
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as killed,
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as alive,
    ):
        assert killed.stdout
        assert alive.stdout
        gone, kept = killed.stdout.readline().strip(), alive.stdout.readline().strip()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (tmp_path / "somebody").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with writing.temporary_folder("x") as folder:
            assert names(tmp_path) == sorted([folder.name, kept, "somebody"])
            assert gone not in names(tmp_path)
        assert names(tmp_path / kept) == ["file"]
        assert alive.stdin
        alive.stdin.close()
        assert alive.wait() == 0
    assert names(tmp_path) == ["somebody"]
