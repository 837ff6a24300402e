"""stdout and stderr that cannot be written, or that the shell closed."""

import subprocess
import sys
from pathlib import Path

import pytest

from commands import ENVIRONMENT, pixels_of, save_photo, untrained_weights

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")


def run(arguments: str, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f'exec "$0" -m serpent_ir {arguments} {redirection}'
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(
        ["sh", "-c", command, sys.executable], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_written_are_one_line_and_a_status(unbuffered):
    for arguments in ("--version", "restore --help", *(["models --json"] if unbuffered else [])):
        done = run(arguments, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (1, "serpent: error: standard output: No space left on device\n")


def test_messages_that_cannot_be_written_change_no_status():
    for redirection in ("2> /dev/full", "> /dev/full 2> /dev/full", ">&- 2>&-"):
        assert run("nonsense", redirection).returncode == 2
    assert run("--version", "2> /dev/full").stdout.startswith("serpent ")


def test_work_goes_on_without_streams(tmp_path):
    weights = untrained_weights(tmp_path)["deblur"]
    save_photo(tmp_path / "photos" / "a.png", 8, 9)
    save_photo(tmp_path / "photos" / "b.png", 9, 8)
    for redirection in ("2> /dev/full", "<&- >&- 2>&-"):
        out = tmp_path / "out"
        done = run(f"restore {tmp_path}/photos -o {out} --weights {weights} --device cpu", redirection)
        assert done.returncode == 0
        assert pixels_of(out / "a.png").shape == (8, 9, 3)
        for file in out.iterdir():
            file.unlink()
