"""What benchmarks/network.py derives and benchmarks/render.py writes; what they measure needs a GPU."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from training_files import draw_folders, draw_image

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def network() -> ModuleType:
    return load("network")


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


def test_floors_of_the_issue(network: ModuleType) -> None:
    """Issue 3 estimates 109 G exponentials and some 15 ms of traffic for Serpent-H at 2048."""
    floors = network.floors("serpent_h", 1, 2048)
    assert floors["exponentials_ms"] == pytest.approx(1e3 * 109e9 / network.EXPONENTIALS, rel=0.03)
    assert 10 < floors["bytes_ms"] < 16
    as_many_positions = network.floors("serpent_b", 16, 2048)
    assert as_many_positions["exponentials_ms"] == pytest.approx(floors["exponentials_ms"])
    assert network.floors("unet_32", 1, 256) == {}


def test_results_are_written_from_the_files(tmp_path: Path) -> None:
    tables = load("render")
    nothing = {"graph_ms": None, "call_ms": None, "gb": None, "error": "out of memory"}
    figures = {"graph_ms": 100.0, "call_ms": 110.0, "gb": 5.0}
    gpu = {"device": "some GPU", "torch": "2", "triton": None}
    network = gpu | {
        "inference": [{"name": "serpent_h", "size": 2048, **figures}, {"name": "unet_32", "size": 2048, **nothing}],
        "training": [{"name": "serpent_b", "batch": 16, "size": 128, **figures}],
        "kernels": [{"name": "serpent_b", "ours": 120, "plain": 480}],
    }
    row = {
        "name": "cuda",
        "shape": [1, 64, 64, 256],
        "d_state": 22,
        "forward_graph_ms": 0.071,
        "public_forward_ms": 0.142,
    }
    row |= {"backward_graph_ms": None, "backward_events_ms": 0.213, "public_backward_ms": 0.59}
    (tmp_path / "network.some.json").write_text(json.dumps(network))
    (tmp_path / "scan.some.json").write_text(json.dumps(gpu | {"dtype": "bfloat16", "rows": [row]}))
    loop = {"model": "unet_32", "batch": 16, "crop": 128, "ms": 40.0, "waited_ms": 41.0, "host_ms": 39.0}
    loops = [loop | {"way": "plain", "infer_ms": 2.6}, loop | {"way": "replayed", "ms": 10.0, "same": True}]
    loops.append(loop | {"way": "graphed_step", "ms": 8.0})
    (tmp_path / "plain_loop.some.json").write_text(json.dumps(gpu | {"note": "", "loops": loops}))
    text = tables.render(tmp_path)
    assert "| unet_32 16 x 128 | 40.0 | 10.0 | 4.00 | 8.00 | 41.0 | 41.0 | 41.0 | 39.0 | 39.0 | yes | 2.60 |  |" in text
    assert "| serpent_h 2048 | 100 | 463 | 4.63 | 110 | 1.10 | 5.00 |" in text
    assert "| unet_32 2048 | out of memory | 58.1 |" in text
    assert "| serpent_b 16 x 128 | 100 | 52.0 | 0.52 | 110 | 0.47 | 5.00 | 1.28 | 0.26 |" in text
    assert "serpent_b 120 (480)" in text
    assert "256, 22 | 0.0710 | 0.142 | 2.00 | 0.0920 | 0.0231 | 0.213 | 0.590 | 2.77 | 3.00 |" in text
    assert tables.render() == tables.RESULTS.read_text()


def test_one_command_measures_one_process_and_two_and_prints_their_ratio(tmp_path):
    """On the CPU, over Gloo; --tiny is there for that."""
    data, out = draw_folders(tmp_path) / "train", tmp_path / "steps.json"
    call = [sys.executable, FOLDER / "train_step.py", "--data", data, "--tiny", "--out", out]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    record = json.loads(out.read_text())
    assert record["device"] == "cpu"
    assert [(row["gpus"], row["crop"], row["batch"], row["graph"]) for row in record["steps"]] == [
        (1, 16, 4, False),
        (2, 16, 8, False),
    ]
    one, two = (row["images_per_second"] for row in record["steps"])
    assert record["ratios"] == [
        {"gpus": 2, "crop": 16, "batch_of_each": 4, "ratio": two / one, "ratio_plain": two / one}
    ]
    assert ended.stdout.splitlines()[-1] == f"gpus 2  crop 16  batch_of_each 4  ratio {two / one:.4g}  ratio_plain " + (
        f"{two / one:.4g}"
    )


def test_plain_loops_are_measured(tmp_path):
    out = tmp_path / "loops.json"
    call = [sys.executable, FOLDER / "train_step.py", "--loops", "serpent_b", "--tiny", "--out", out]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    plain, replayed = json.loads(out.read_text())["loops"]
    assert (plain["way"], replayed["way"], replayed["same"]) == ("plain", "replayed", True)
    assert plain["ms"] > 0 and len(ended.stdout.splitlines()) == 2


def test_ratios_are_of_steps_as_they_run_and_of_those_without_a_graph() -> None:
    def row(gpus: int, crop: int, batch: int, rate: float | None) -> dict[str, object]:
        return {"gpus": gpus, "crop": crop, "batch": batch, "images_per_second": rate}

    rows = [row(1, 64, 8, 100.0), row(1, 128, 4, 20.0), row(1, 64, 8, 150.0), row(1, 128, 4, None)]
    rows += [row(2, 64, 16, 195.0), row(2, 128, 8, None)]
    assert load("train_step").ratios(rows) == [
        {"gpus": 2, "crop": 64, "batch_of_each": 8, "ratio": 1.3, "ratio_plain": 1.95},
        {"gpus": 2, "crop": 128, "batch_of_each": 4, "ratio": None, "ratio_plain": None},
    ]


def test_the_share_of_data_is_measured_on_a_cpu_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw_image(72, 80, seed=0).save(tmp_path / "images" / "0.png")
    out = tmp_path / "data.json"
    call = [sys.executable, FOLDER / "data.py", "--data", tmp_path / "images", "--device", "cpu", "--out", out]
    call += ["--count", "1", "--repeats", "1"]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    record, published = (json.loads(file.read_text()) for file in (out, FOLDER / "results" / "data.h200.json"))
    assert record.keys() == published.keys()
    for part in ("batches", "steps"):
        assert [row["task"] for row in record[part]] == ["deblur", "sr8", "photo"]
        assert record[part][0].keys() == published[part][0].keys()
    for row in record["steps"]:
        assert row["share"] == pytest.approx(1 - row["kept_ms"] / row["prefetched_ms"])


@pytest.mark.filterwarnings("ignore:serpent_ir")
def test_what_a_user_calls_is_measured_beside_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with small images, and in this process."""
    calls = load("end_to_end")
    monkeypatch.setitem(calls.SIZES, "256", (24, 40))
    state = calls._State("serpent_b.deblur", "cpu")

    class Worker:
        def ask(self, what: str, size: str, kind: str) -> list[float]:
            return getattr(calls, f"_{what}")(state, size, kind)

    args = argparse.Namespace(sizes=["256"], kinds=list(calls.KINDS), repeats=1)
    rows = calls._images({"ours": Worker(), "against": Worker()}, args)
    assert [row["kind"] for row in rows] == ["network", *calls.KINDS]
    assert all(row["against / network"] == row["against"] / rows[0]["ours"] for row in rows)
    phases = calls._phases(state, "256")
    assert list(phases) == ["size", "decode", "upload", "to floats", "network", "to samples", "download", "encode"]
    record = {
        "device": "cpu",
        "cores": 2,
        "torch": "2",
        "name": "x",
        "against": "y",
        "images": rows,
        "phases": [phases],
    }
    record["batches"] = [{"size": "256", "images": 400, "ours images a second": 600.0, "ours GB": 1.5}]
    lines = load("render").calls([record])
    assert any(line.startswith("| 256 numpy | ") for line in lines)
    assert "`serpent restore` of folders, 400 images of 256: 600 a second; 1.50 GB of main memory." in lines
