"""serpent env: what a bug report needs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from scan_inputs import make_inputs

from serpent_ir import __version__
from serpent_ir.cli import env
from serpent_ir.ops import BACKENDS, cpu, default_backend, ss2d, why_not


def test_what_it_says_of_backends_is_what_happens(capsys):
    env(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["serpent_ir"] == __version__
    assert told["torch"].startswith(torch.__version__)
    assert told["packages"]["numpy"] is not None
    (device,) = [device for device in told["devices"] if device["name"] == "cpu"]
    assert device["backend"] == default_backend(torch.device("cpu"))
    assert list(device["backends"]) == list(BACKENDS)
    tensors = make_inputs(1, 3, 4, 8, 2, 1)
    for backend, reason in device["backends"].items():
        if not reason:
            assert ss2d(*tensors, backend=backend).isfinite().all()
        elif os.environ.get("TRITON_INTERPRET") != "1" or backend != "triton":
            with pytest.raises((ValueError, RuntimeError)):
                ss2d(*tensors, backend=backend)
    if not cpu.unavailable():
        assert told["cpu_library"]["level"] in told["cpu_library"]["levels"] == cpu.levels()
    assert why_not("cpu", torch.device("cuda")) and why_not("cuda", torch.device("cpu"))


def test_it_names_nobody_and_needs_no_home(tmp_path):
    where = {
        "HOME": str(tmp_path / "ada-lovelace"),
        "XDG_CACHE_HOME": str(tmp_path / "ada-lovelace" / ".cache"),
        "PATH": "/usr/bin",
    }
    for environment in (where, {"PATH": "/usr/bin"}):
        ran = subprocess.run(
            [sys.executable, "-m", "serpent_ir.cli", "env"], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert "the scan runs by" in ran.stdout and "lovelace" not in ran.stdout
