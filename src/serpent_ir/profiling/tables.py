"""Makes tables of rows of measurements."""

from collections.abc import Sequence
from typing import Any

from serpent_ir.profiling import rows as profiling_rows
from serpent_ir.profiling.rows import Rows


def about(rows: Rows) -> str:
    """What all rows have in common, in one line."""
    row = rows[0]
    if row["device"] == "cpu":
        device = f"CPU, {row['threads']} threads" if row.get("threads") else "CPU"
    else:
        device = row["device"]
    graphed = [bool(r.get("infer_graph_ms")) for r in rows if r.get("infer_ms") is not None]
    graph = ", times from CUDA graphs" if any(graphed) else ""
    if graph and not all(graphed):
        graph += " where there is one"
    batch = "" if row["batch"] == 1 else f", batch {row['batch']}"
    return f"{device}, {row['precision']}{batch}{graph}"


Table = tuple[str, list[str], list[list[str]]]


def tables(rows: Rows) -> list[Table]:
    """All figures as tables of one subject each: title, columns and cells. Empty columns are left out."""
    counted = [[f"{row['params'] / 1e6:.3f}", f"{row['macs'] / 1e9:.3f}", f"{row['flops'] / 1e9:.3f}"] for row in rows]
    found = [_kept("Counted, of one image", rows, ["parameters (M)", "GMACs", "GFLOPs"], counted)]
    for kind, key, title in (("inference", "infer", "Inference"), ("training", "train", "A training step")):
        if not profiling_rows.was_tried(rows, kind):
            continue
        rate = ("images/s", "images_per_s") if kind == "inference" else ("60,000 images (s)", "train_s_per_60k")
        cells = [
            [
                *(_time(row, key), _time(row, f"{key}_graph"), _number(row.get(rate[1]))),
                *(_number(row[f"{key}_gb"]), _missing(row, kind)),
            ]
            for row in rows
        ]
        columns = ["plain call (ms)", "CUDA graph (ms)", rate[0], "peak memory (GB)", "what is missing, and why"]
        found.append(_kept(title, rows, columns, cells))
    return found


def _kept(title: str, rows: Rows, columns: list[str], cells: list[list[str]]) -> Table:
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[row["model"], str(row["size"]), *(line[i] for i in kept)] for row, line in zip(rows, cells, strict=True)]
    return title, ["network", "size", *(columns[i] for i in kept)], lines


def _missing(row: dict[str, Any], kind: str) -> str:
    notes = [note.removeprefix(f"{kind}: ") for note in row.get("notes", []) if note.startswith(f"{kind}: ")]
    return "; ".join(filter(None, [profiling_rows.error_of(row, kind), *notes]))


def markdown(rows: Rows) -> list[str]:
    """The lines of the same in Markdown."""
    lines = []
    for title, columns, cells in tables(rows):
        head = [table_line(columns), table_line(["---"] * len(columns))]
        lines += [f"**{title}**", "", *head, *map(table_line, cells), ""]
    return lines[:-1]


def _time(row: dict[str, Any], key: str) -> str:
    """The median, and half the distance between the 10th and 90th percentiles, which a single call does not have."""
    ms, spread = row.get(f"{key}_ms"), row.get(f"{key}_range_ms")
    if ms is None:
        return ""
    half = (spread[1] - spread[0]) / 2 if spread else 0
    width = f"{half:.0f}" if half >= 10 else f"{half:.2g}"
    return f"{profiling_rows.short(ms)} ± {width}" if half else profiling_rows.short(ms)


def _number(value: float | None) -> str:
    return "" if value is None else profiling_rows.short(value)


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
