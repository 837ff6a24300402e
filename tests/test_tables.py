"""benchmarks/tables.py from end to end, with seconds for minutes."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import ENVIRONMENT

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tables.py"


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        small = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def tables(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--data", str(folder), "--out", str(folder / "out"), "--device", "cpu"]
    command += ["--tasks", "deblur", "--networks", "serpent_b", "unet_32", "--crop", "16", "--batch", "1"]
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_two_networks_in_seconds(tmp_path, monkeypatch):
    for name in ("faces256", "faces512", "natural"):
        draw(tmp_path / name / "train", 2)
        draw(tmp_path / name / "val", 1)
    budget = ("--minutes", 0.01, "--probe-seconds", 0.1, "--curve-images", 3, "--at-once", 2)
    done = tables(tmp_path, *budget)
    assert done.returncode == 0, done.stderr
    runs = {run["model"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    assert runs.keys() == {"serpent_b", "unet_32"}
    for name, run in runs.items():
        assert (run["task"], run["minutes"], run["seed"], run["batch"]) == ("deblur", 0.01, 0, 1)
        assert run["images"] == run["steps"] == max(1, round(600 / run["step_ms"]))
        probes = {probe["lr"]: probe["psnr"] for probe in run["probes"]}
        assert probes.keys() == {1e-3, 5e-4}
        assert probes[run["lr"]] == max(probes.values())
        assert run["evaluation"].keys() == {"faces256/val", "faces512/val", "natural/val"}
        assert all(figures["n"] == 1 for figures in run["evaluation"].values())
        looks = [point["images"] for point in run["curve"]]
        assert looks[-1] == run["images"], name
        assert all(b == 2 * a for a, b in itertools.pairwise(looks[:-1])), looks
        assert run["seconds"] == pytest.approx(run["steps"] * run["step_ms"] / 1e3, abs=0.06)
    # The slowest network's last step is where all are compared.
    assert {run["curve"][0]["images"] for run in runs.values()} == {min(run["images"] for run in runs.values())}
    page = (tmp_path / "out" / "results.md").read_text()
    assert page.strip() in done.stdout
    assert "## deblur, 0.01 minutes a network" in page
    assert "LPIPS (no weights given: --lpips-weights)" in page
    fewest = min(run["images"] for run in runs.values())
    assert f"Equal images: at {fewest:,}, which is as far as" in page
    # Every network has a row for each set, and one at equal images.
    assert page.count("| Serpent-B |") == page.count("| U-Net (32) |") == 4
    assert "| - | - | - |" not in page
    # Once more: all is there.
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    again = tables(tmp_path, *budget)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done already") == 2
    assert "packing" not in again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tables import main  # pyright: ignore[reportMissingImports]

    # With another seed they would be mixed; and what would fail after training fails now.
    for options, told in [
        (("--seed", 1), "serpent_b.json: of other settings (seed 0, now 1); give another --out or remove it"),
        (("--lpips-weights", tmp_path / "none.pth"), "none.pth: no such weights file"),
        (("--data", tmp_path / "none"), "/val: no such folder"),
    ]:
        monkeypatch.setattr(sys, "argv", list(map(str, again.args[1:] + list(options))))
        with pytest.raises(SystemExit, match=f"^tables.py: error: .*{re.escape(told)}$"):
            main()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before


def test_a_curve_is_read_between_its_validations(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tables import at_images, render  # pyright: ignore[reportMissingImports]

    curve = [
        {"images": 100, "seconds": 10.0, "psnr": 20.0, "ssim": 0.5},
        {"images": 400, "seconds": 40.0, "psnr": 24.0, "ssim": 0.7},
    ]
    assert at_images(curve, 100) == curve[0]
    assert at_images(curve, 200) == pytest.approx({"psnr": 22.0, "ssim": 0.6, "seconds": 25.0})
    assert at_images(curve, 50) is None
    assert at_images(curve, 401) is None
    failed = [{"model": "swinir_l", "task": "sr8", "minutes": 2.5, "error": "out of memory"}]
    assert "## sr8, 2.5 minutes a network\n\nSwinIR-L: out of memory\n" in render(failed)
