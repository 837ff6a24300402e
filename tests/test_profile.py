"""serpent profile and serpent report: figures from real processes, and pages from figures."""

import json
import math
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from commands import process, serpent
from serpent_ir import create_model, measure, profiling
from serpent_ir.measure import Cell, Worker
from serpent_ir.paper import CLAIMS, NAMES, TABLES
from serpent_ir.profiling import count, profile

KEYS = {
    "model", "size", "batch", "device", "precision", "params", "macs", "flops", "infer_ms", "infer_gb", "train_ms",
    "train_gb", "infer_range_ms", "train_range_ms", "images_per_s", "train_s_per_60k",
}  # fmt: skip
COUNTS = {  # parameters and MACs at 256x256
    "serpent_b": (3.92e6, 1.402e9), "serpent_h": (3.917e6, 22.248e9), "unet_128": (124.1e6, 192.77e9),
    "swinir_l": (11.5e6, 804.7e9), "swinir_b": (3.4e6, 243.6e9), "restormer_24": (6.676e6, 40.48e9),
}  # fmt: skip


def test_a_profile_on_the_cpu():
    done = process("profile", "-n", "serpent_b", "--size", "40", "--train", "--json", "--seconds", 0.05)
    assert done.returncode == 0, done.stderr
    assert "[2/2] serpent_b 40 training: " in done.stderr
    (row,) = json.loads(done.stdout)
    assert row.keys() >= KEYS
    assert "error" not in row
    counts = count(create_model("serpent_b"), 40, 40)
    assert (row["params"], row["macs"], row["flops"]) == (counts.params, counts.macs, counts.flops)
    assert (row["model"], row["size"], row["batch"], row["device"]) == ("serpent_b", 40, 1, "cpu")
    assert row["precision"] == "float32"
    for kind in ("infer", "train"):
        low, high = row[f"{kind}_range_ms"]
        assert 0 < low <= row[f"{kind}_ms"] <= high
        assert row[f"{kind}_graph_ms"] is None
        if sys.platform == "linux":
            weights = 4e-9 * counts.params  # training: and gradients and two moments
            assert (weights if kind == "infer" else 4 * weights) < row[f"{kind}_gb"] < 1
    assert row["images_per_s"] == pytest.approx(1e3 / row["infer_ms"])
    assert row["train_s_per_60k"] == pytest.approx(60 * row["train_ms"])


class Greedy(nn.Module):
    """Takes some memory, and then more than there is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        kept.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


kept: list[weakref.ref] = []


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_out_of_memory_is_a_result(kind, monkeypatch):
    cell = Cell(kind, "serpent_b", 16, 1, "cpu", "auto", 0.01)
    monkeypatch.setattr(measure, "create_model", lambda name: Greedy())
    assert measure.measure(cell) == {"error": "out of memory"}
    assert kept[-1]() is None  # nothing is left for the next one
    monkeypatch.undo()
    assert measure.measure(cell)["ms"] > 0


def test_any_error_is_a_result(monkeypatch):
    class OutOfResources(Exception):  # noqa: N818 - Triton's is no RuntimeError
        pass

    def fail(name):
        raise OutOfResources("out of resource: shared memory")

    monkeypatch.setattr(measure, "create_model", fail)
    # A device without streams of its own, as MPS.
    monkeypatch.setattr(measure, "pick_device", lambda name: torch.device("meta"))
    error = measure.measure(Cell("infer", "serpent_b", 16, 1, "auto", "auto", 0.01))["error"]
    assert error == "out of resource: shared memory"


def test_what_does_not_fit_is_null_and_the_rest_goes_on(monkeypatch):
    answers = {
        ("serpent_b", 32, "infer"): {"ms": 2.0, "range_ms": [1.0, 3.0], "gb": 0.5},
        ("serpent_b", 32, "train"): {"error": "out of memory"},
        ("serpent_b", 64, "infer"): {"ms": 8.0, "range_ms": [7.0, 9.0], "gb": None, "gb_note": "not told"},
        ("unet_32", 32, "infer"): {"ms": 4e3, "range_ms": [4e3, 4e3], "gb": 1e6},
        ("unet_32", 32, "train"): {"ms": 1.0, "range_ms": [1.0, 1.0], "gb": 1e6},
    }
    asked = []

    def answer(self, cell, limit):
        asked.append((cell.model, cell.size, cell.kind))
        return answers[asked[-1]]

    monkeypatch.setattr(Worker, "__call__", answer)
    rows = profile(["serpent_b", "unet_32"], [64, 32], train=True, device="cpu")
    assert asked == list(dict.fromkeys(sorted(asked, key=lambda a: a[1])))  # small sizes first, nothing twice
    assert set(asked) == set(answers)
    errors = {(row["model"], row["size"]): row.get("error") for row in rows}
    assert errors["serpent_b", 32] == "training: out of memory"
    assert errors["serpent_b", 64] == "training: out of memory (at 32 already)"
    assert errors["unet_32", 32] is None
    told = errors["unet_32", 64].split("; ")
    assert told[0] == "inference: skipped: a call would take about 16 s, as 32 says"
    assert told[1].startswith("training: out of memory: about 4000000.0 GB expected, as 32 says")
    assert rows[0]["train_ms"] is None
    assert rows[0]["train_gb"] is None
    assert rows[0]["infer_ms"] == 2.0
    assert rows[2]["notes"] == ["inference: not told"]


def test_what_died_says_nothing_of_larger_sizes(monkeypatch):
    answers = [{"error": "it died (status -11)"}, {"error": "stopped after 160 s"}, {"error": "out of memory"}]
    monkeypatch.setattr(Worker, "__call__", lambda self, cell, limit: answers.pop(0))
    rows = profile(["serpent_b"], [32, 64, 96, 128], device="cpu")
    told = ["it died (status -11)", "stopped after 160 s", "out of memory", "out of memory (at 96 already)"]
    assert [row["error"] for row in rows] == [f"inference: {error}" for error in told]


def test_a_report_goes_on_after_an_interruption(tmp_path, monkeypatch):
    asked = []

    def answer(self, cell, limit):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((cell.model, cell.size, cell.kind))
        if cell.kind == "train":
            return {"error": "out of memory"}
        return {"ms": 2.0, "range_ms": [1.0, 3.0], "gb": 0.001}

    monkeypatch.setattr(Worker, "__call__", answer)
    call = ("report", tmp_path / "r", "-n", "serpent_b", "--size", "32,64", "--device", "cpu", "--seconds", 1)
    # A training step at 64 is not asked for; the row of 96 is what Ctrl-C ends.
    assert serpent(*call[:4], "--size", "32,64,96", *call[6:]).exit_code == 130
    assert not (tmp_path / "r" / "profile.json").exists()
    assert len(json.loads((tmp_path / "r" / "profile.part.json").read_text())["rows"]) == 2
    asked.clear()
    result = serpent(*call)
    assert result.exit_code == 0, result.output
    assert "profile.part.json: goes on from 2 rows" in result.output
    assert asked == []
    rows = json.loads((tmp_path / "r" / "profile.json").read_text())
    assert [row["error"] for row in rows] == ["training: out of memory", "training: out of memory (at 32 already)"]
    assert not (tmp_path / "r" / "profile.part.json").exists()
    # Other settings: all anew.
    (tmp_path / "r" / "profile.part.json").write_text(json.dumps({"seconds": 2.0, "rows": rows}))
    (tmp_path / "r" / "profile.json").unlink()
    assert serpent(*call).exit_code == 0
    assert asked == [("serpent_b", 32, "infer"), ("serpent_b", 32, "train"), ("serpent_b", 64, "infer")]


def test_memory_ends_in_a_real_process_and_one_that_hangs_is_stopped():
    (row,) = profile(["serpent_b"], [3_000_000], seconds=0.05, device="cpu")  # an image of 108 TB
    assert row["error"] == "inference: out of memory"
    assert row["infer_ms"] is None
    assert row["macs"] == pytest.approx(1.402e9 * (3_000_000 / 256) ** 2, rel=1e-3)
    cell = Cell("infer", "serpent_b", 16, 1, "cpu", "auto", 0.01)
    with Worker(fresh=False) as worker:
        assert worker(cell, limit=0.01) == {"error": "stopped after 0 s"}
        first = worker(cell, limit=100)
        process = worker.process
        assert worker(cell, limit=100)["ms"] > 0
        assert worker.process is process
    assert first["ms"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_profile_on_a_gpu():
    """One process measures all: what does not fit leaves nothing behind, and what follows has the same memory."""
    names = ["serpent_b", "unet_32"]
    rows = profile(names, [64, 60_000], train=True, seconds=1.0, device="cuda")
    for row in rows[:2]:
        assert "error" not in row
        assert "notes" not in row  # a CUDA graph of both
        assert 0 < row["infer_graph_ms"] < 1.5 * row["infer_ms"]
        assert 0 < row["train_graph_ms"] < 1.5 * row["train_ms"]
        assert row["infer_gb"] > 4e-9 * row["params"]
        assert row["train_gb"] > 16e-9 * row["params"]  # and gradients and two moments
    for row in rows[2:]:
        assert "out of memory" in row["error"] or "skipped" in row["error"]
    cells = [Cell("infer", "serpent_b", size, 1, "cuda", "auto", 0.1) for size in (64, 200_000, 64)]
    with Worker(fresh=False) as worker:
        before, failed, after = (worker(cell, limit=300) for cell in cells)
    assert failed == {"error": "out of memory"}
    assert after["gb"] == pytest.approx(before["gb"], rel=0.05)


def rows_of_a_gpu(sizes=(256, 512)) -> list[dict]:
    """A profile as an H100 might give it: SwinIR-L and Restormer cannot train at the larger sizes."""
    rows = []
    for size in sizes:
        for model, (params, macs) in COUNTS.items():
            area = (size / 256) ** 2
            row = {
                "model": model, "size": size, "batch": 1, "device": "NVIDIA H100", "precision": "bfloat16",
                "torch": "2.13", "threads": None, "params": params, "macs": macs * area, "flops": 2 * macs * area,
                "infer_ms": macs / 2e10 * area + 1, "infer_range_ms": [1.0, 2.0], "infer_graph_ms": macs / 2e10 * area,
                "infer_graph_range_ms": [1.0, 2.0], "images_per_s": 100.0, "infer_gb": area,
                "train_ms": 30.0 * area, "train_graph_ms": 20.0 * area, "train_gb": 2.0 * area,
                "train_s_per_60k": 1200.0 * area,
            }  # fmt: skip
            if size > 256 and model in ("swinir_l", "restormer_24"):
                row |= {key: None for key in row if key.startswith("train")}
                row["error"] = "training: out of memory"
            rows.append(row)
    return rows


def a_run(model: str, psnr: float) -> dict:
    figures = {"psnr": psnr, "ssim": 0.8, "input_psnr": 20.0, "input_ssim": 0.3}
    return {"model": model, "task": "deblur", "minutes": 2.5, "seconds": 150.0, "evaluation": {"faces256/val": figures}}


def test_a_report_with_missing_points(tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(rows_of_a_gpu()))
    runs = [a_run("serpent_b", 27.12), a_run("unet_128", 26.5)]
    (tmp_path / "tables.json").write_text(json.dumps({"runs": runs}))
    sources = ("--from", tmp_path / "profile.json", "--from", tmp_path / "tables.json")
    result = serpent("report", tmp_path / "report", *sources)
    assert result.exit_code == 0, result.output
    names = {"resolution", "networks_256", "networks_512", "psnr_ms_256", "psnr_ms_256_paper", "psnr_ms_512_paper"}
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"report.md"}
    for name in names:
        with Image.open(tmp_path / "report" / f"{name}.png") as image:
            assert image.width > 700
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    drawn = (tmp_path / "report" / "networks_512.svg").read_text()
    assert drawn.count("out of memory") >= 4  # time and memory of two networks
    assert "SwinIR-L" in (tmp_path / "report" / "resolution.svg").read_text()
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| Table 1, top | Serpent-B 256 | 1.4 | 1.4 | 2.8 | 2 |" in page
    assert "| Table 1, bottom | Restormer 512 | 161.9 | 161.9 | 28.5 | out of memory |" in page
    assert "| FLOPS of SwinIR-B over Serpent-B | 512 | abstract, 4.3 | 150 x | 173.8 x |" in page
    assert "| training memory of Serpent-H over Restormer (the size is not said: 256 here) | 256 | 4.3 |" in page
    assert page.count("the clause names no network") == 1
    assert "| deblur 256 | Serpent-B | 28.44 | 0.8054 | 0.3041 | 27.12 | 0.8000 | no weights | 2.5 min |" in page
    for name in names:
        assert f"({name}.png)" in page


def test_a_report_draws_one_device_and_says_so(tmp_path):
    rows = rows_of_a_gpu((256,))
    (tmp_path / "profile.json").write_text(json.dumps([*rows, {**rows[0], "device": "cpu", "macs": 1e15}]))
    result = serpent("report", tmp_path, "--from", tmp_path / "profile.json")
    assert "1 rows of another device, precision or batch than the first row's are left out" in result.output
    assert "1000000" not in (tmp_path / "report.md").read_text()


def test_errors_of_people_are_a_line(tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text('[{"model": "serpent_b"}]')
    (tmp_path / "runs.json").write_text('{"runs": [{}]}')
    (tmp_path / "empty.json").write_text("[]")
    for call, told in [
        (("profile", "-n", "serpent_x"), "unknown model 'serpent_x'"),
        (("profile", "--size", "big"), "--size big: sides in pixels"),
        (("profile", "--size", "0"), "sizes and the batch must be at least 1"),
        (("profile", "--json", "--markdown"), "give one of them"),
        (("report", tmp_path, "--from", tmp_path / "none.json"), "none.json: cannot be read"),
        (("report", tmp_path, "--from", tmp_path / "other.json"), "other.json: neither a profile"),
        (("report", tmp_path, "--from", tmp_path / "runs.json"), "runs.json: neither a profile"),
        (("report", tmp_path, "--from", tmp_path / "empty.json"), "empty.json: there is nothing in it"),
        (("report", tmp_path / "other.json"), "other.json: "),
    ]:
        result = serpent(*call)
        assert result.exit_code in (1, 2)
        assert told in result.output
        assert result.output.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = serpent("report", tmp_path)
    assert "drawing figures needs matplotlib: pip install 'serpent-ir[report]'" in result.output


def test_what_the_paper_prints_agrees_with_itself():
    """Its ratios of FLOPS with its tables: a slip in the transcription would show."""
    gmacs = {(row.model, row.size): row.gmacs for row in TABLES if row.gmacs}
    for size, other in ((256, 512), (512, 256)):  # convolutions grow by the area; two lines are not printed
        for model in NAMES:
            if (model, size) not in gmacs and (model, other) in gmacs:
                gmacs[model, size] = gmacs[model, other] * (size / other) ** 2
    printed = {"150 x": 158, "40 x": 39.7, "7 x": 7.2, "3 %": 2.95, "about 50 %": 54.8}
    claims = [claim for claim in CLAIMS if claim.figure == "macs"]
    assert len(claims) == 6
    for claim in claims:
        ratio = gmacs[claim.model, claim.size] / gmacs[claim.other, claim.size] * (100 if claim.percent else 1)
        assert ratio == pytest.approx(printed[claim.printed], rel=0.02)
    assert all(math.isfinite(row.psnr) and 0 < row.ssim < 1 for row in TABLES)
    assert profiling.PAPER_IMAGES == 60_000
