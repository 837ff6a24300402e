"""benchmarks/tables.py from end to end, with seconds for minutes."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tables.py"


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        small = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def arguments_of(folder: Path, *more: object) -> list[str]:
    options = ["--data", folder, "--out", folder / "out", "--device", "cpu", "--tasks", "deblur", "--crop", 16]
    return list(map(str, [*options, "--batch", 1, "--networks", "serpent_b", "unet_32", *more]))


def draw_all(folder: Path) -> None:
    for name in ("faces256", "faces512", "natural"):
        draw(folder / name / "train", 2)
        draw(folder / name / "val", 1)


def test_two_networks_in_seconds(tmp_path, monkeypatch, capsys):
    draw_all(tmp_path)
    budget = ("--minutes", 0.01, "--probe-seconds", 0.1, "--curve-images", 3, "--at-once", 2)
    arguments = arguments_of(tmp_path, *budget)
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = {run["model"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    assert runs.keys() == {"serpent_b", "unet_32"}
    for name, run in runs.items():
        assert (run["task"], run["minutes"], run["seed"], run["batch"]) == ("deblur", 0.01, 0, 1)
        assert run["device"] == run["minutes_of"] == "cpu"
        assert run["images"] == run["steps"] == max(1, round(600 / run["step_ms"]))
        assert {probe["lr"] for probe in run["probes"]} == {1e-3, 5e-4}
        # Runs of three times as long have chosen.
        chosen = {probe["lr"]: probe for probe in run["longer"]}
        assert chosen.keys() == {1e-3, 5e-4}
        assert chosen[run["lr"]]["psnr"] == max(probe["psnr"] for probe in chosen.values())
        assert {probe["step"] for probe in chosen.values()} == {max(1, round(300 / run["step_ms"]))}
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
    assert "## deblur, 0.01 minutes a network\n\nMinutes of cpu, PyTorch" in page
    assert "Trained on" not in page
    assert "Learning rate: the better of those named, by 0.3 s each.\n" in page
    assert "LPIPS (no weights given: --lpips-weights)" in page
    fewest = min(run["images"] for run in runs.values())
    assert f"Equal images: at {fewest:,}, which is as far as" in page
    # Every network has a row for each set, and one at equal images.
    assert page.count("| Serpent-B |") == page.count("| U-Net (32) |") == 4
    assert "| - | - | - |" not in page
    # Once more: all is there.
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tables import main  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    main()
    told = capsys.readouterr().err
    assert told.count("done already") == 2
    assert "packing" not in told
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before
    # With another seed they would be mixed; and what would fail after training fails now.
    for options, told in [
        (("--seed", 1), "serpent_b.json: of other settings (seed 0, now 1); give another --out or remove it"),
        (("--lpips-weights", tmp_path / "none.pth"), "none.pth: no such weights file"),
        (("--data", tmp_path / "none"), "/val: no such folder"),
    ]:
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments, *map(str, options)])
        with pytest.raises(SystemExit, match=f"^tables.py: error: .*{re.escape(told)}$"):
            main()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before


def test_minutes_of_a_device_that_is_not_here(tmp_path, monkeypatch, capsys):
    """Probes of another budget and of a GPU that nobody has: what is trained from them is of its minutes."""
    draw_all(tmp_path)
    options = ("--minutes", 0.01, "--probe-seconds", 0.1, "--curve-images", 3)
    there = ("--minutes-of", "GPU X")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tables import Devices, arguments, job_of, main  # pyright: ignore[reportMissingImports]
    from tables_kept import timed  # pyright: ignore[reportMissingImports]

    out, once = tmp_path / "out", Devices.__call__

    def call(*more: object) -> None:
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments_of(tmp_path, *options, *more)])

    call("--networks", "serpent_b")
    main()

    def known(*more: object) -> set[str]:
        call("--networks", "serpent_b", *more)
        args = arguments()
        return set(timed(job_of("deblur", args), args.lrs, out))

    # Whatever the minutes are, probes are what they are; a row is as good as a probe.
    (out / "deblur.0.01min" / "serpent_b.probe.json").unlink()
    (out / "deblur.0.01min" / "serpent_b.longer.json").unlink(missing_ok=True)
    assert known() == known("--minutes", 7) == known("--minutes", 7, "--lpips-weights", "a.pth") == {"serpent_b"}
    for other in [("--seed", 1), there, ("--lrs", 0.1), ("--crop", 8), ("--curve-images", 4), ("--probe-seconds", 1)]:
        assert known("--minutes", 7, *other) == set()

    # A row as another device would have left it, with a PyTorch of its own; of a second network a probe, under another
    # budget.
    row = json.loads((out / "deblur.0.01min" / "serpent_b.json").read_text())
    torch_here = row["torch"]
    del row["minutes_of"]  # as it was before there was such a thing
    row |= {"device": "GPU X", "torch": "1.0", "settings": {**row["settings"], "device": "GPU X", "torch": "1.0"}}
    (out / "deblur.0.01min" / "serpent_b.json").write_text(json.dumps(row))
    rates = [5e-4, 1e-3]
    probe = {
        "probes": [{"lr": lr, "step": 1, "psnr": 20 + 1e2 * lr, "ssim": 0.5} for lr in rates],
        "step_ms": 200.0,
        "settings": {**row["settings"], "lrs": rates},
    }
    (out / "deblur.3min").mkdir()
    (out / "deblur.3min" / "unet_32.probe.json").write_text(json.dumps(probe))
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    for more, told in [
        ((), f"(device GPU X, now cpu; torch 1.0, now {torch_here}); give another --out or remove it, or give --min"),
        (
            (*there, "--networks", "serpent_b", "unet_32", "serpent_l", "swinir_b"),
            f"{out} has no probe on GPU X with these settings of deblur serpent_l, deblur swinir_b; call there",
        ),
        ((*there, "--seed", 1), "serpent_b.json: of other settings (seed 0, now 1); give"),
    ]:
        call("--networks", "serpent_b", *more)
        with pytest.raises(SystemExit, match=f"^tables.py: error: .*{re.escape(told)}"):
            main()
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before

    capsys.readouterr()
    call(*there)  # serpent_b and unet_32
    main()
    said = capsys.readouterr().err
    assert "serpent_b: done already" in said
    # Nothing was probed but, for longer, what the GPU's probes had left open.
    assert re.findall("(.*) ms a step", said) == ["deblur unet_32: by 0.3 s at 200.0"]
    place = out / "deblur.0.01min"
    assert {path.name for path in place.glob("*.json")} == {"serpent_b.json", "unet_32.longer.json", "unet_32.json"}
    new = json.loads((out / "deblur.0.01min" / "unet_32.json").read_text())
    assert (new["device"], new["torch"], new["minutes_of"]) == ("cpu", torch_here, "GPU X")
    assert (new["steps"], new["step_ms"], new["seconds"]) == (3, 200.0, 0.6)
    assert [(probe["lr"], probe["step"]) for probe in new["longer"]] == [(lr, 2) for lr in rates]
    assert new["lr"] == max(new["longer"], key=lambda probe: probe["psnr"])["lr"]
    assert new["settings"] == probe["settings"]  # so that GPU X can go on from it
    page = (out / "results.md").read_text()
    assert "the better of those named, by 0.3 s each.\n" in page
    assert "\nMinutes of GPU X, PyTorch 1.0; crops of 16," in page
    assert f"\nTrained on GPU X (PyTorch 1.0): Serpent-B; on cpu (PyTorch {torch_here}): U-Net (32).\n" in page
    assert "Their steps are those that GPU X makes in the minutes." in page

    # Rows of before longer runs chose every rate: they are made, and a row stays if they choose the one that it has.
    for name, lr in (("serpent_b", row["lr"]), ("unet_32", min(set(rates) - {new["lr"]}))):
        old = json.loads((place / f"{name}.json").read_text())
        del old["longer"]
        (place / f"{name}.json").write_text(json.dumps({**old, "lr": lr}))
    longer = {"longer": row["longer"], "settings": row["settings"]}
    (place / "serpent_b.longer.json").write_text(json.dumps(longer))  # and an interruption
    (place / "unet_32.longer.json").unlink()
    call(*there)
    # What goes wrong on the way leaves the rows as they are.
    before = {name: (place / name).read_bytes() for name in ("serpent_b.json", "unet_32.json")}
    for what in ("probe longer", "train"):

        def fails(self: Devices, job: Any, *more: Any, what: str = what) -> dict[str, Any] | None:
            return {"error": "ended"} if job.what == what else once(self, job, *more)

        monkeypatch.setattr(Devices, "__call__", fails)
        with pytest.raises(SystemExit, match=r"^failed: unet_32; the same command tries again$"):
            main()
        monkeypatch.setattr(Devices, "__call__", once)
        assert (place / "unet_32.json").read_bytes() == before["unet_32.json"]
        results = json.loads((out / "results.json").read_text())["runs"]
        assert (
            sorted(run["model"] for run in results if "error" not in run)
            == ["serpent_b", "unet_32"]
            == sorted(run["model"] for run in results)
        )
    assert json.loads((place / "serpent_b.json").read_text()) == row
    capsys.readouterr()
    (place / "serpent_b.json").write_bytes(before["serpent_b.json"])
    (place / "unet_32.longer.json").unlink()
    main()
    said = capsys.readouterr().err
    assert "serpent_b: stays as it is" in said
    assert re.findall("deblur (.*): by", said) == ["unet_32"]
    assert json.loads((place / "serpent_b.json").read_text()) == row
    again = json.loads((place / "unet_32.json").read_text())
    assert again["longer"] == new["longer"]  # of the same seed
    assert "unet_32: stays as it is" not in said
    # Trained at the other rate, too: of the two runs the better one stands, and what the other came to beside it.
    assert {again["lr"], again["also"]["lr"]} == set(rates)
    assert again["curve"][-1]["psnr"] >= again["also"]["psnr"]
    page = (out / "results.md").read_text()
    assert "by 0.3 s each; by whole runs at both, on 1 images of faces256/val: U-Net (32) (" in page


def test_a_curve_is_read_between_its_validations(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tables_report import at_images, render  # pyright: ignore[reportMissingImports]

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
