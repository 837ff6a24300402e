"""Images read and written in other processes: the same files, lines and errors, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import save_photo, untrained_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def script(code: str, *words: object) -> str:
    """What a Python of its own, without other threads, prints."""
    call = [sys.executable, "-W", "error::UserWarning:serpent_ir", "-c", code, *map(str, words)]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


RESTORE = """
import sys, warnings
import serpent_ir.files.restore as restore
from serpent_ir.files import restore_files
from multiprocessing import active_children
weights, out, threads = sys.argv[1:]
restore._threads, restore.MANY = lambda device: int(threads), 1
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    results = restore_files(["in"], out, weights=weights)
    print(len(active_children()) if threads != "1" else 4)
    for result in results:
        print(result.job.source, result.status, result.error, result.width, result.height)
for line in sorted(str(note.message).replace(out, "out") for note in said if "in/" in str(note.message)):
    print(line)
print(len(active_children()))
"""


def test_they_make_the_files_of_one_process(tmp_path, monkeypatch):
    for name in ("a.png", "b.jpg", "c.tif", "d.png"):
        save_photo(tmp_path / "in" / name, 16, 20)
    (tmp_path / "in/e.jpg").write_bytes((tmp_path / "in/b.jpg").read_bytes()[:300])
    (tmp_path / "in/f.png").write_bytes(b"no image")
    (tmp_path / "weights").mkdir()
    weights = untrained_weights(tmp_path / "weights")["deblur"]
    monkeypatch.chdir(tmp_path)
    alone, several = (script(RESTORE, weights, f"out{threads}", threads) for threads in (1, 2))
    assert alone == several
    assert several.startswith("4\n") and several.endswith("\n0\n")
    made = [{path.name: path.read_bytes() for path in (tmp_path / f"out{threads}").iterdir()} for threads in (1, 2)]
    assert made[0] == made[1]
    assert len(made[0]) == 4


CALL = """
import os, signal, sys, time, warnings
from multiprocessing import active_children
from serpent_ir.errors import ImageError
from serpent_ir.files.processes import Processes

def whose(): return os.getpid()
def warned(): warnings.warn("mind the gap")
def refused(): raise ImageError("no")
def broken(): raise ValueError("first\\nsecond")
def killed(parent):
    if os.getpid() != parent: os.kill(os.getpid(), signal.SIGKILL)
    return "done here"

if __name__ == "__main__":
    elsewhere = Processes(2)
    assert elsewhere(whose) != os.getpid()
    for child in active_children(): os.kill(child.pid, signal.SIGINT)
    assert elsewhere(whose) != os.getpid()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        elsewhere(warned)
    print([str(note.message) for note in said])
    for function in (refused, broken):
        try: elsewhere(function)
        except Exception as error: print(type(error).__name__, error)
    print(elsewhere(killed, os.getpid()), elsewhere(whose) == os.getpid())
    elsewhere.close()
    other = Processes(1)
    print(*(child.pid for child in active_children()), flush=True)
    if sys.argv[1:]: time.sleep(60)
    other.close()
"""


def test_warnings_errors_and_a_process_that_is_killed():
    lines = script(CALL).splitlines()
    assert lines[:3] == ["['mind the gap']", "ImageError no", "SerpentError unexpected ValueError: first"]
    assert lines[3] == "done here True"


def test_they_end_with_the_process_that_made_them():
    call = [sys.executable, "-c", CALL, "stay"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        children = [process.stdout.readline() for _ in range(5)][-1].split()
        assert children
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_running, children))


def is_running(process: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False
