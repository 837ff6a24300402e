"""What a network costs: counted by the paper's convention (1 MAC = 2 FLOPs, norms count too), and measured."""

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

LARGEST = 1 << 24  # pixels a side; beyond, sizes in bytes overflow


PAPER_IMAGES = 60_000
"""Training images of FFHQ as the paper has them: an epoch."""
SLOWEST = 5
"""A call that is expected to take so many times the seconds of a cell is not tried."""
STARTING = 120
"""Seconds that a process may take for its first call: imports, and kernels that are compiled."""
COMPILING = 480
"""Seconds more for the first cell of a network on CUDA: nothing of it may have been compiled before."""

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
    """Count and measure networks on square images, each measurement in a process of its own.

    Args:
        names: networks, as `create_model` takes them.
        sizes: sides in pixels.
        batch: images in a pass.
        train: measure a training step (forward, L1 loss, backward, Adam), too.
        device: as `pick_device` takes it.
        precision: as `pick_precision` takes it.
        seconds: for about so long the calls of a cell are timed; `SLOWEST` times as much is the longest call tried.
        progress: called with (cells done, cells in all, a line about the last one).
        known: rows of before, of the same `train` and `seconds`; those of the same network, size, batch, device,
            precision, threads, counts and PyTorch are not measured again.
        keep: called with all rows so far after each one that was measured.

    Returns:
        One object for each size and network: model, size, batch, device (its name), precision, torch, threads (None on
        a GPU), seconds (as given), params, macs and flops (of one image), infer_ms (median of plain calls),
        infer_range_ms (10th and 90th percentile), infer_graph_ms and infer_graph_range_ms (replayed from a CUDA graph;
        None elsewhere), images_per_s (of plain calls), infer_gb (peak, 1e9 bytes, weights included); with `train` the
        same of a step as train_*, and train_s_per_60k (seconds for 60,000 images; from the graph where there is one, as
        `serpent train` runs). What could not be measured is None, beside `error`: "inference: out of memory", say, also
        where a smaller size says so already; `notes` holds what else is to be known.

    Raises:
        UsageError: an unknown network, device or precision, or a size or batch below 1.
    """
    target = pick_device(device)
    dtype = pick_precision(precision, target)
    if batch < 1 or any(not 1 <= size <= LARGEST for size in sizes):
        raise UsageError(f"sizes must be from 1 to {LARGEST}, and the batch at least 1")
    names, sizes = list(dict.fromkeys(names)), sorted(set(sizes))
    for name in names:
        _on_meta(name)  # an unknown one is better refused now
        if task := name.partition(".")[2]:
            create_degradation(task)
    kinds = ["infer", "train"] if train else ["infer"]
    rows = []
    done, total = 0, len(names) * len(sizes) * len(kinds)
    # Of each network and kind, the size measured last: what the next one takes is expected from it.
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
                    # What died or was stopped says nothing of larger sizes.
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
    """Whether a row of before is what would be measured now: all that is known beforehand agrees.

    A cell that died or was stopped is tried again.
    """
    errors = [error_of(known, kind) for kind in _KINDS.values()]
    return all(not error or error.startswith((OUT_OF_MEMORY, "skipped")) for error in errors) and all(
        known.get(key) == value for key, value in row.items() if not key.startswith(("infer_", "train_", "images"))
    )


def _result(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """What `measure` said of a cell, as far as larger sizes are expected from it; {} where it was not measured."""
    if row[f"{kind}_ms"] is not None:
        return {"ms": row[f"{kind}_ms"], "gb": row[f"{kind}_gb"]}
    spent = (OUT_OF_MEMORY, f"{OUT_OF_MEMORY} (the system ended the process)")
    return {"error": OUT_OF_MEMORY} if error_of(row, _KINDS[kind]) in spent else {}


def _too_much(cell: Cell, size: int, result: dict[str, Any], device: torch.device) -> str:
    """Why a cell is not worth a try, from what the same took at a smaller size; "" where it is."""
    if not result:
        return ""
    if "error" in result:
        return f"{result['error']} (at {size} already)"
    growth = (cell.size / size) ** 2
    call = growth * result["ms"] / 1e3
    if call > SLOWEST * cell.seconds:
        return f"skipped: a call would take about {short(call)} s, as {size} says"
    if device.type == "cuda":  # says itself what does not fit; a computer begins to swap before it does
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
