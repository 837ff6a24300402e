"""A slice of the campaign of faults (`make faults`): every kind, by the same drivers, each fault another one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and /proc of Linux")
def test_sixty_faults_break_nothing():
    """In a process of its own, which forks: this one has threads."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "faults", "--faults", "60", "--seed", "19", "--json"],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    rows = told["rows"]
    assert sum(map(sum, rows.values())) + sum(told["outside"].values()) == 60
    assert all(held >= 3 and not broken for held, broken in rows.values()), told
