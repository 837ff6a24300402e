"""Rows of measurements: reads, checks and orders them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serpent_ir.errors import OUT_OF_MEMORY, SerpentError
from serpent_ir.profiling.paper import NAMES

Rows = list[dict[str, Any]]

TEXTS, COUNTS = ("model", "device", "precision"), ("size", "batch", "params", "macs", "flops")

MEASURED = ("infer_ms", "infer_gb", "train_ms", "train_gb")

TIMED = ("infer_graph_ms", "train_graph_ms", "images_per_s", "train_s_per_60k")

RANGES = ("infer_range_ms", "infer_graph_range_ms", "train_range_ms", "train_graph_range_ms")


def load(files: Sequence[Path]) -> tuple[Rows, Rows]:
    """The rows of profiles (`serpent profile --json`) and the runs of comparisons (`benchmarks/tables.py`).

    Raises SerpentError for a file that is neither.
    """
    rows, runs = [], []
    for file in files:
        try:
            content = json.loads(file.read_text())
        except OSError as error:
            raise SerpentError(f"{file}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise SerpentError(f"{file}: not JSON ({error})") from None
        if content == [] or content == {"runs": []}:
            raise SerpentError(f"{file}: there is nothing in it, neither rows of a profile nor runs")
        if isinstance(content, list) and all(map(is_row, content)):
            rows += content
        elif isinstance(content, dict) and isinstance(content.get("runs"), list) and all(map(_is_run, content["runs"])):
            runs += content["runs"]
        else:
            raise SerpentError(
                f"{file}: neither a profile (serpent profile --json) nor results of benchmarks/tables.py"
            )
    return rows, runs


def of_one_budget(runs: Rows) -> Rows:
    models: dict[str, dict[float, set[str]]] = {}
    for run in runs:
        if run.get("evaluation"):
            models.setdefault(run["task"], {}).setdefault(run["minutes"], set()).add(run["model"])
    kept = {task: max(found, key=lambda minutes: (len(found[minutes]), minutes)) for task, found in models.items()}
    return [run for run in runs if run["minutes"] == kept.get(run["task"])]


def is_row(row: Any) -> bool:
    """Whether something is a row of a profile. What was not measured may be None or missing."""

    def number(value: Any) -> bool:
        return _is_number(value) and value >= 0

    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in TEXTS)
        and all(number(row.get(key)) and row[key] for key in COUNTS)
        and all(row.get(key) is None or number(row[key]) for key in (*MEASURED, *TIMED))
        and all(row.get(key) != 0 for key in ("infer_ms", "train_ms", *TIMED))  # memory may be too small to see
        and all(
            row.get(key) is None or (isinstance(row[key], list) and len(row[key]) == 2 and all(map(number, row[key])))
            for key in RANGES
        )
        and isinstance(row.get("error", ""), str)
        and isinstance(row.get("notes", []), list)
        and all(isinstance(note, str) for note in row.get("notes", []))
    )


def _is_run(run: Any) -> bool:
    """Whether a run of benchmarks/tables.py has what is read from it. A failed run has no evaluation."""
    if (
        not isinstance(run, dict)
        or not _is_number(run.get("minutes"))
        or not all(isinstance(run.get(key), str) for key in ("model", "task"))
    ):
        return False
    evaluation = run.get("evaluation", {})
    return isinstance(evaluation, dict) and all(
        isinstance(figures, dict)
        and all(map(_is_number, (figures.get("psnr"), figures.get("ssim"), run.get("seconds"))))
        and (figures.get("lpips") is None or _is_number(figures["lpips"]))
        for figures in evaluation.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300  # this excludes NaN


def label_of(model: str) -> str:
    return NAMES.get(model, model)


def in_order(models: set[str]) -> list[str]:
    """The paper's networks first, in its order."""
    return [name for name in NAMES if name in models] + sorted(models - NAMES.keys())


def error_of(row: dict[str, Any], kind: str) -> str:
    """Why a row has no figure of `inference` or `training`; "" if it has one, or if none was tried."""
    inference, _, training = f"; {row.get('error', '')}".partition("; training: ")
    return training if kind == "training" else inference.removeprefix("; inference: ").removeprefix("; ")


def why_missing(row: dict[str, Any], kind: str) -> str:
    """The same in a few words."""
    error = error_of(row, kind)
    if not error:
        return "not measured"
    return OUT_OF_MEMORY if OUT_OF_MEMORY in error else "skipped" if "skipped" in error else "failed"


def by_plain_call(row: dict[str, Any], rows: Rows, kind: str) -> bool:
    """Whether a row's time is that of plain calls while other rows' are replays from a CUDA graph."""
    key = {"training": "train", "inference": "infer"}[kind]
    return bool(row[f"{key}_ms"] and not row.get(f"{key}_graph_ms") and any(r.get(f"{key}_graph_ms") for r in rows))


def was_tried(rows: Rows, kind: str) -> bool:
    """Whether `inference` or `training` was measured, or failed, in any row."""
    return any(row["train_ms" if kind == "training" else "infer_ms"] or kind in row.get("error", "") for row in rows)


def short(value: float) -> str:
    """The number with three significant figures and no exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"
