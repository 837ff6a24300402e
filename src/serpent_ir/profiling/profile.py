"""Counts by the paper's convention (1 MAC = 2 FLOPs, norms count too) and measures what a network costs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from serpent_ir.degradations import create_degradation
from serpent_ir.errors import OUT_OF_MEMORY, UsageError
from serpent_ir.models import create_model
from serpent_ir.profiling.cell import Cell, Worker
from serpent_ir.profiling.count import count
from serpent_ir.profiling.rows import error_of, short
from serpent_ir.system.devices import device_name, pick_device, pick_precision
from serpent_ir.system.memory import available

LARGEST = 1 << 24  # pixels per side; beyond that, sizes in bytes overflow


PAPER_IMAGES = 60_000
"""Training images of FFHQ in the paper, which make an epoch."""
SLOWEST = 5
"""A call that is expected to take this many times the seconds of a cell is not tried."""
STARTING = 120
"""Seconds that a process may take for its first call, for imports and for compiling kernels."""
COMPILING = 480
"""Additional seconds for the first cell of a network on CUDA, since none of its kernels may have been compiled yet."""

_KINDS = {"infer": "inference", "train": "training"}


def profile(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    batch: int = 1,
    train: bool = False,
    device: str = "auto",
    precision: str = "auto",
    seconds: float = 2.0,
    progress: Callable[[int, int, str], None] | None = None,
    known: Sequence[dict[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Count and measure networks on square images, with each measurement in a separate process.

    Args:
        names: networks, as `create_model` takes them.
        sizes: sides in pixels.
        batch: images per pass.
        train: whether to measure a training step too (forward, L1 loss, backward, Adam).
        device: as `pick_device` takes it.
        precision: as `pick_precision` takes it.
        seconds: time to spend on the calls of a cell, about. Calls of up to `SLOWEST` times as long are tried.
        progress: called with (cells done, all cells, a line about the last one).
        known: earlier rows with the same `train` and `seconds`. Those with the same network, size, batch, device,
            precision, threads, counts and PyTorch are not measured again.
        keep: called with all rows so far after each measured row.

    Returns:
        One dict per size and network: model, size, batch, device (its name), precision, torch, threads (None on a GPU),
        seconds (as given), params, macs and flops (of one image), infer_ms (median of plain calls), infer_range_ms
        (10th and 90th percentiles), infer_graph_ms and infer_graph_range_ms (replayed from a CUDA graph; None
        elsewhere), images_per_s (of plain calls), infer_gb (peak, 1e9 bytes, weights included). With `train` the same
        for a step as train_*, and train_s_per_60k (seconds for 60,000 images; from the graph if there is one, as
        `serpent train` runs). What could not be measured is None, and `error` says why, for example "inference: out of
        memory", also if that follows from a smaller size. `notes` holds further remarks.

    Raises:
        UsageError: an unknown network, device or precision, or a size or batch below 1.
    """
    target = pick_device(device)
    dtype = pick_precision(precision, target)
    if batch < 1 or any(not 1 <= size <= LARGEST for size in sizes):
        raise UsageError(f"sizes must be from 1 to {LARGEST}, and the batch at least 1")
    names, sizes = list(dict.fromkeys(names)), sorted(set(sizes))
    for name in names:
        _on_meta(name)  # so that an unknown name is refused now
        if task := name.partition(".")[2]:
            create_degradation(task)
    kinds = ["infer", "train"] if train else ["infer"]
    rows = []
    done, total = 0, len(names) * len(sizes) * len(kinds)
    # For each network and kind the last measured size, from which the cost of the next one is predicted.
    last: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    with Worker(fresh=target.type == "cpu") as worker:
        for size in sizes:
            for name in names:
                row = _counted(name, size, batch, target, dtype) | {"seconds": seconds}
                if found := next((other for other in known if _same(other, row)), None):
                    rows.append(found)
                    last |= {(name, kind): (size, result) for kind in kinds if (result := _result(found, kind))}
                    done += len(kinds)
                    continue
                for kind in kinds:
                    cell = Cell(kind, name, size, batch, device, precision, seconds)
                    error = _too_much(cell, *last.get((name, kind), (0, {})), target)
                    compiling = COMPILING if target.type == "cuda" and (name, kind) not in last else 0
                    limit = STARTING + compiling + 4 * SLOWEST * seconds
                    result = {"error": error} if error else worker(cell, limit)
                    # A process that died or was stopped says nothing about larger sizes.
                    if not error and result.get("error", OUT_OF_MEMORY).startswith(OUT_OF_MEMORY):
                        last[name, kind] = size, result
                    _add(row, kind, batch, result)
                    done += 1
                    if progress:
                        progress(done, total, f"{name} {size} {_KINDS[kind]}: {_told(result)}")
                rows.append(row)
                if keep:
                    keep(rows)
    return rows


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):  # nothing is allocated or initialised
        return create_model(name)


def _counted(name: str, size: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    model = _on_meta(name)
    counts = count(model, size, size, channels=getattr(getattr(model, "config", None), "in_channels", 3))
    on_gpu = device.type == "cuda"
    return {
        "model": name,
        "size": size,
        "batch": batch,
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": None if on_gpu else torch.get_num_threads(),
        "params": counts.params,
        "macs": counts.macs,
        "flops": counts.flops,
        **dict.fromkeys(("infer_ms", "infer_range_ms", "infer_graph_ms", "infer_graph_range_ms", "images_per_s")),
        "infer_gb": None,
        **dict.fromkeys(("train_ms", "train_range_ms", "train_graph_ms", "train_graph_range_ms", "train_s_per_60k")),
        "train_gb": None,
    }


def _same(known: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether an earlier row is what would be measured now: everything that is known beforehand agrees.

    A cell that died or was stopped is tried again.
    """
    errors = [error_of(known, kind) for kind in _KINDS.values()]
    return all(not error or error.startswith((OUT_OF_MEMORY, "skipped")) for error in errors) and all(
        known.get(key) == value for key, value in row.items() if not key.startswith(("infer_", "train_", "images"))
    )


def _result(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """What `measure` said of a cell, as far as it predicts larger sizes; {} if it was not measured."""
    if row[f"{kind}_ms"] is not None:
        return {"ms": row[f"{kind}_ms"], "gb": row[f"{kind}_gb"]}
    spent = (OUT_OF_MEMORY, f"{OUT_OF_MEMORY} (the system ended the process)")
    return {"error": OUT_OF_MEMORY} if error_of(row, _KINDS[kind]) in spent else {}


def _too_much(cell: Cell, size: int, result: dict[str, Any], device: torch.device) -> str:
    """Why a cell is not worth trying, judged by what it took at a smaller size; "" if it is."""
    if not result:
        return ""
    if "error" in result:
        return f"{result['error']} (at {size} already)"
    growth = (cell.size / size) ** 2
    call = growth * result["ms"] / 1e3
    if call > SLOWEST * cell.seconds:
        return f"skipped: a call would take about {short(call)} s, as {size} says"
    if device.type == "cuda":  # a GPU reports what does not fit, while a computer begins to swap before that
        return ""
    need, free = growth * (result["gb"] or 0), available(device) / 1e9
    return f"{OUT_OF_MEMORY}: about {need:.1f} GB expected, as {size} says; {free:.1f} are free" if need > free else ""


def _add(row: dict[str, Any], kind: str, batch: int, result: dict[str, Any]) -> None:
    if "error" in result:
        told = f"{_KINDS[kind]}: {result['error']}"
        row["error"] = f"{row['error']}; {told}" if "error" in row else told
        return
    for key in ("ms", "range_ms", "graph_ms", "graph_range_ms", "gb"):
        row[f"{kind}_{key}"] = result.get(key)
    notes = [f"{_KINDS[kind]}: {result[key]}" for key in ("graph_note", "gb_note") if key in result]
    if notes:
        row["notes"] = row.get("notes", []) + notes
    if kind == "infer":
        row["images_per_s"] = 1e3 * batch / result["ms"]
    else:
        row["train_s_per_60k"] = PAPER_IMAGES / batch * (result.get("graph_ms") or result["ms"]) / 1e3


def _told(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    gb = "" if result["gb"] is None else f", {result['gb']:.2f} GB"
    graph = f", {short(result['graph_ms'])} ms from a CUDA graph" if result.get("graph_ms") else ""
    note = f" ({result['graph_note']})" if "graph_note" in result else ""
    return f"{short(result['ms'])} ms{graph}{gb}{note}"
