"""serpent profile: figures from real processes; serpent report goes on after any end of them."""

import contextlib
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from commands import ENVIRONMENT, process, serpent
from serpent_ir import create_model
from serpent_ir.profiling import cell as measure
from serpent_ir.profiling import count, profile, tables
from serpent_ir.profiling.cell import Cell, Worker

KEYS = {
    "model", "size", "batch", "device", "precision", "params", "macs", "flops", "infer_ms", "infer_gb", "train_ms",
    "train_gb", "infer_range_ms", "train_range_ms", "images_per_s", "train_s_per_60k",
}  # fmt: skip


def test_a_profile_on_the_cpu():
    done = process("profile", "-n", "serpent_b", "--size", "40", "--train", "--json", "--seconds", 0.05)
    assert done.returncode == 0, done.stderr
    assert "[2/2] serpent_b 40 training: " in done.stderr
    assert "Warning" not in done.stderr
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


def test_one_call_that_had_to_wait_is_not_taken_for_a_slow_network(monkeypatch):
    times = iter([900.0, 2500.0])  # a busy machine; all calls after take a millisecond
    monkeypatch.setattr(measure, "_timed_once", lambda call, device: next(times, 1.0))
    found = measure.measure(Cell("infer", "serpent_b", 32, 1, "cpu", "float32", seconds=1.0))
    assert found["ms"] == 1
    assert found["calls"] > 1


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
    def fail(name):
        raise OutOfResources("out of resource: shared memory")

    monkeypatch.setattr(measure, "create_model", fail)
    # A device without streams of its own, as MPS.
    monkeypatch.setattr(measure, "pick_device", lambda name: torch.device("meta"))
    result = measure.measure(Cell("infer", "serpent_b", 16, 1, "auto", "auto", 0.01))
    assert result == {"error": "out of resource: shared memory", "spoilt": True}


class OutOfResources(Exception):  # noqa: N818 - Triton's is no RuntimeError
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (MemoryError(), "out of memory"),
        (
            torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\n"),
            "CUDA error: operat",
        ),
        (NotImplementedError("Could not run 'aten::x'\nmore"), "Could not run 'aten::x'"),
        (OutOfResources("out of resource: shared memory"), "out of resource: shared memory"),
        (ValueError("no"), "no"),
    ],
)
def test_where_no_graph_is_possible_the_plain_call_counts(error, said, monkeypatch):
    @contextlib.contextmanager
    def capture(graph, stream):
        try:
            yield
        finally:  # as the end of a capture that failed does
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    def call():
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    cell = Cell("infer", "serpent_b", 16, 1, "cuda", "auto", 0.1)
    note = measure._graph(call, cell, 2.0, torch.device("cpu"))
    assert note.pop("graph_note").startswith(f"no CUDA graph, by plain call alone: {said}")
    assert note == {"graph_ms": None, "graph_range_ms": None, "spoilt": True}


def test_a_row_without_a_graph_says_so(monkeypatch):
    note = "no CUDA graph, by plain call alone: out of memory"
    answer = {
        "ms": 2.0,
        "range_ms": [1.0, 3.0],
        "gb": 0.5,
        "graph_ms": None,
        "graph_range_ms": None,
        "graph_note": note,
    }
    monkeypatch.setattr(Worker, "__call__", lambda self, cell, limit: answer)
    lines = []
    (row,) = profile(["serpent_b"], [32], device="cpu", progress=lambda done, total, line: lines.append(line))
    assert (row["infer_ms"], row["infer_graph_ms"], row["notes"]) == (2.0, None, [f"inference: {note}"])
    assert "error" not in row
    assert lines == [f"serpent_b 32 inference: 2 ms, 0.50 GB ({note})"]
    assert note in "\n".join(tables.markdown([row]))


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
    # What died is tried again.
    rows[1]["error"] = "inference: it died (status -11); training: out of memory (at 32 already)"
    (tmp_path / "r" / "profile.part.json").write_text(json.dumps({"seconds": 1.0, "rows": rows}))
    (tmp_path / "r" / "profile.json").unlink()
    assert serpent(*call).exit_code == 0
    assert asked == [("serpent_b", 64, "infer")]
    asked.clear()
    # Other settings: all anew.
    (tmp_path / "r" / "profile.part.json").write_text(json.dumps({"seconds": 2.0, "rows": rows}))
    (tmp_path / "r" / "profile.json").unlink()
    assert serpent(*call).exit_code == 0
    assert asked == [("serpent_b", 32, "infer"), ("serpent_b", 32, "train"), ("serpent_b", 64, "infer")]


def test_a_killed_report_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "r"
    options = ["report", folder, "-n", "serpent_b", "--size", "16,24", "--device", "cpu", "--seconds", 0.2]
    command = [sys.executable, "-m", "serpent_ir.cli", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        assert run.stderr is not None
        assert any(line.startswith("[3/4] serpent_b 24 inference: ") for line in run.stderr)
        run.kill()
    (kept,) = json.loads((folder / "profile.part.json").read_text())["rows"]
    assert kept["train_ms"] > 0
    again = process(*options)
    assert again.returncode == 0, again.stderr
    assert "profile.part.json: goes on from 1 rows" in again.stderr
    assert "serpent_b 16" not in again.stderr
    assert "[3/4] serpent_b 24 inference: " in again.stderr
    rows = json.loads((folder / "profile.json").read_text())
    assert rows[0] == kept
    assert rows[1]["size"] == 24
    assert rows[1]["train_ms"] > 0
    assert {"report.md", "resolution.png"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".*")) + list(folder.glob("*.part*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_measures_ends_with_the_one_that_asked():
    code = (
        "import threading, time; from serpent_ir.profiling.cell import Cell, Worker; worker = Worker(fresh=False); "
        "cell = Cell('infer', 'serpent_h', 256, 1, 'cpu', 'auto', 600.0); "
        "threading.Thread(target=worker, args=(cell, 600.0), daemon=True).start(); time.sleep(0.5); "
        "print(worker.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as asking:
        assert asking.stdout is not None
        measuring = Path(f"/proc/{int(asking.stdout.readline())}/cmdline")
        assert b"serpent_ir.profiling.cell" in measuring.read_bytes()
        asking.kill()
    until = time.monotonic() + 20  # it may not have begun; its cell takes longer
    while measuring.exists() and measuring.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    assert not measuring.exists() or not measuring.read_bytes()


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
    rows = profile(names, [64, 60_000], train=True, seconds=0.5, device="cuda")
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
