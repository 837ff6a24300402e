"""Redraws the paper's efficiency figures from a profile, and writes a page that compares both in numbers."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serpent_ir.errors import OUT_OF_MEMORY, UsageError
from serpent_ir.image import replacing
from serpent_ir.profiling import figures, paper
from serpent_ir.profiling import rows as profiling_rows
from serpent_ir.profiling.rows import MEASURED, Rows, of_one_budget
from serpent_ir.profiling.tables import about, markdown, table_line

SETTING = ("device", "precision", "batch")
VAL = {"deblur": {256: "faces256/val", 512: "faces512/val"}, "sr8": {512: "faces512/val"}}
"""Our set of images that corresponds to a table of the paper."""


def write(folder: Path, rows: Rows, runs: Rows) -> list[Path]:
    """Draw all figures that the rows of a profile and the runs of a comparison allow, and write `report.md`.

    Only rows with the device, precision and batch of the first row are drawn. If a network and size occur several
    times, the last row counts. A UserWarning says what is left out. For each task the runs of one budget are used: of
    the budgets with most networks, the longest.

    Raises:
        UsageError: there are no rows, or matplotlib is missing.
    """
    if not rows:
        raise UsageError("there is nothing to draw: a profile without rows")
    folder.mkdir(parents=True, exist_ok=True)
    setting = {key: rows[0][key] for key in SETTING}
    others = [row for row in rows if any(row[key] != setting[key] for key in SETTING)]
    if others:
        warnings.warn(
            f"{len(others)} rows of another device, precision or batch than the first row's are left out", stacklevel=2
        )
    rows = [{**dict.fromkeys(MEASURED), **row} for row in rows if row not in others]
    last = list({(row["model"], row["size"]): row for row in rows}.values())
    if len(last) < len(rows):
        warnings.warn(f"{len(rows) - len(last)} rows of a network and size that come again are left out", stacklevel=2)
    rows = last
    runs = of_one_budget(runs)
    files = draw(folder, rows, runs)
    with replacing(folder / "report.md") as file:
        file.write(page(rows, runs, files).encode())
    return [*files, folder / "report.md"]


def draw(folder: Path, rows: Rows, runs: Rows) -> list[Path]:
    """Draw only the figures, as PNG and SVG. Returns their files."""
    told = about(rows)
    sizes = sorted({row["size"] for row in rows})
    files = figures.save(partial(figures.over_resolution, rows, told), folder, "resolution")
    for size in sizes:
        files += figures.save(partial(figures.bars, rows, size, told), folder, f"networks_{size}")
    for size in sizes:
        here = f"Milliseconds: {told}.\nPSNR:"
        if ours := _measured_quality(rows, runs, size):
            measured = f"{here} measured here, on {VAL['deblur'][size]}, after {_budget(runs)}"
            drawing = partial(figures.quality_over_time, ours, size, measured)
            files += figures.save(drawing, folder, f"psnr_ms_{size}")
        if printed := _printed_quality(rows, size):
            drawing = partial(figures.quality_over_time, printed, size, f"{here} as the paper prints it")
            files += figures.save(drawing, folder, f"psnr_ms_{size}_paper")
    return files


def _ms(row: dict[str, Any]) -> float | None:
    ms = row.get("infer_graph_ms") or row["infer_ms"]
    return ms and ms / row["batch"]


def _measured_quality(rows: Rows, runs: Rows, size: int) -> list[tuple[str, float, float]]:
    data = VAL["deblur"].get(size)
    psnr = {
        run["model"]: run["evaluation"][data]["psnr"]
        for run in runs
        if run["task"] == "deblur" and data in run.get("evaluation", {})
    }
    return _with_times(rows, psnr, size)


def _budget(runs: Rows) -> str:
    minutes = next(run["minutes"] for run in runs if run["task"] == "deblur")
    return f"{minutes:g} minute{'s' * (minutes != 1)} of training each"


def _printed_quality(rows: Rows, size: int) -> list[tuple[str, float, float]]:
    psnr = {row.model: row.psnr for row in paper.TABLES if (row.task, row.size) == ("deblur", size)}
    return _with_times(rows, psnr, size)


def _with_times(rows: Rows, psnr: dict[str, float], size: int) -> list[tuple[str, float, float]]:
    times = {row["model"]: ms for row in rows if row["size"] == size and (ms := _ms(row)) is not None}
    return [(model, times[model], psnr[model]) for model in profiling_rows.in_order(psnr.keys() & times.keys())]


def page(rows: Rows, runs: Rows, files: Sequence[Path]) -> str:
    """report.md."""
    sizes = sorted({row["size"] for row in rows})
    versions = sorted({str(row["torch"]) for row in rows if "torch" in row})
    lines = [
        "# What the networks cost",
        "",
        f"Measured on: {about(rows)}" + (f", PyTorch {' and '.join(versions)}" if versions else "") + ".",
        "",
        "- *The paper* is Sepehri, Fabian and Soltanolkotabi: Serpent. *Here* is the machine named above.",
        "- 1 MAC = 2 FLOPs. What the paper heads GFLOPS are GMACs. 1 GB = 1e9 bytes. Sizes are sides in pixels.",
        "- Memory is the peak of plain calls: weights, images, and in training gradients and Adam's moments.",
        "- *Out of memory*: it was tried, or a smaller size ran out. *Skipped*: it would have taken too long.",
        "- Each figure also exists as SVG. `serpent report` wrote this page; docs/train/compare.md tells how.",
        "",
        "## Over resolution (the paper's Figure 1)",
        "",
        "![MACs and training memory over resolution](resolution.png)",
        "",
    ]
    if missing := _out_of_memory(rows):
        lines += [f"Out of memory in training: {missing}.", ""]
    for size in sizes:
        which = {256: " (the paper's Figure 6)", 512: " (the paper's Figure 7)"}.get(size, "")
        lines += [f"## At {size}x{size}{which}", "", f"![Costs at {size}](networks_{size}.png)", ""]
        for file in files:
            if file.suffix == ".png" and file.stem in (f"psnr_ms_{size}", f"psnr_ms_{size}_paper"):
                whose = "as the paper prints it" if file.stem.endswith("paper") else "measured here"
                lines += [f"![PSNR, {whose}, over milliseconds measured here]({file.name})", ""]
    beside = _beside_the_tables(rows) + _claims(rows)
    if not beside:
        printed = sorted({row.size for row in paper.TABLES})
        told = " and ".join(map(str, printed))
        told = f"The paper prints numbers of its networks at {told}. None of these sizes was measured here."
        beside = ["## Beside the paper", "", told, ""]
    lines += beside + _quality(runs)
    lines += [
        "## Every figure",
        "",
        "Times are medians, ± half the distance between the 10th and the 90th percentile.",
        "",
    ]
    return "\n".join([*lines, *markdown(rows), ""])


def _out_of_memory(rows: Rows) -> str:
    """The networks that run out of memory in training, each with the smallest size at which it does."""
    first: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        if profiling_rows.why_missing(row, "training") == OUT_OF_MEMORY:
            first.setdefault(row["model"], row["size"])
    return ", ".join(
        f"{profiling_rows.label_of(model)} from {first[model]} on" for model in profiling_rows.in_order(set(first))
    )


def _beside_the_tables(rows: Rows) -> list[str]:
    ours = {(row["model"], row["size"]): row for row in rows}
    lines = []
    for printed in paper.TABLES:
        row = ours.get((printed.model, printed.size))
        if row is None or printed.gmacs is None:
            continue
        cells = [printed.table, f"{profiling_rows.label_of(printed.model)} {printed.size}", f"{printed.gmacs}"]
        lines.append(table_line([*cells, f"{row['macs'] / 1e9:.1f}", f"{printed.train_gb}", _training_memory(row)]))
    if row := ours.get(paper.DOES_NOT_TRAIN):
        name, size = paper.DOES_NOT_TRAIN
        cells = [
            "section 4.3",
            f"{profiling_rows.label_of(name)} {size}",
            "",
            f"{row['macs'] / 1e9:.1f}",
            "more than 80",
        ]
        lines.append(table_line([*cells, _training_memory(row)]))
    if not lines:
        return []
    return [
        "## Beside the paper's Table 1",
        "",
        "| place | network, size | GMACs: paper | here | training memory (GB): paper | here |",
        "| --- | --- | --: | --: | --: | --: |",
        *lines,
        "",
        f"The paper measured with batch 1 on one H100. Here: {about(rows)}. The paper says neither which precision it",
        "used nor what its memory includes. The standard SwinIR counts more MACs than the paper prints, and was not",
        "tuned to match. The text of Table 1 that was transcribed has no lines of Serpent at 512.",
        "",
    ]


def _training_memory(row: dict[str, Any]) -> str:
    gb = row["train_gb"]
    return profiling_rows.short(gb) if gb is not None else profiling_rows.why_missing(row, "training")


def _claims(rows: Rows) -> list[str]:
    ours = {(row["model"], row["size"]): row for row in rows}
    lines = []
    for claim in paper.CLAIMS:
        both = [ours.get((model, claim.size)) for model in (claim.model, claim.other)]
        if None in both:
            continue
        a, b = (row.get(claim.figure) if row else None for row in both)
        if not a or not b:
            kind = "training" if claim.figure.startswith("train") else "inference"
            ratio = " and ".join(
                f"{profiling_rows.label_of(row['model'])}: {profiling_rows.why_missing(row, kind)}"
                for row, value in zip(both, (a, b), strict=True)
                if row and not value
            )
        else:
            ratio = f"{100 * a / b:.1f} %" if claim.percent else f"{a / b:.1f} x"
        words = f"{claim.words} ({claim.said})" if claim.said else claim.words
        lines.append(table_line([words, str(claim.size), claim.place, claim.printed, ratio]))
    for size, hours in paper.GPU_HOURS.items():
        row = ours.get(("serpent_h", size))
        if row and (seconds := row.get("train_s_per_60k")):
            words = (
                f"GPU hours of Serpent-H's {paper.EPOCHS} epochs (in progressive stages there, all at full size here"
            )
            words += "; the clause names no network: Serpent-H by context)" if size == 512 else ")"
            here = f"{paper.EPOCHS * seconds / 3600:.0f} h"
            lines.append(table_line([words, str(size), "appendix A", f"{hours} h", here]))
    if not lines:
        return []
    head = ["what the paper says of", "size", "where (sections)", "paper", "here"]
    told = "The bars and curves of its Figures 1, 6 and 7 carry no numbers. These numbers stand in its text."
    return ["## Beside the paper's text", "", told, "", table_line(head), table_line(["---"] * len(head)), *lines, ""]


def _quality(runs: Rows) -> list[str]:
    if not runs:
        return []
    lines = []
    for task, sizes in VAL.items():
        for size, data in sizes.items():
            printed = {row.model: row for row in paper.TABLES if (row.task, row.size) == (task, size)}
            mine = {run["model"]: run for run in runs if run["task"] == task and data in run.get("evaluation", {})}
            for model in profiling_rows.in_order(printed.keys() | mine.keys() if mine else set()):
                there = printed.get(model)
                cells = [f"{task} {size}", profiling_rows.label_of(model)]
                cells += [f"{there.psnr:.2f}", f"{there.ssim:.4f}", f"{there.lpips:.4f}"] if there else [""] * 3
                if run := mine.get(model):
                    here = run["evaluation"][data]
                    lpips = here.get("lpips")
                    cells += [
                        f"{here['psnr']:.2f}",
                        f"{here['ssim']:.4f}",
                        "no weights" if lpips is None else f"{lpips:.4f}",
                    ]
                    cells += [f"{run['seconds'] / 60:.2f} min"]
                else:
                    cells += [""] * 4
                lines.append(table_line(cells))
    if not lines:
        return []
    head = ["task, size", "network", "paper: PSNR (dB)", "SSIM", "LPIPS"]
    head += ["here: PSNR (dB)", "SSIM", "LPIPS", "trained here"]
    return [
        "## Quality beside the paper's Tables 1 and 2",
        "",
        "Data and training differ. The paper trains for 60 epochs of FFHQ (95 GPU hours for Serpent-H at 256, appendix",
        "A). Here a network is trained for the minutes of the last column, on other faces. A cell is empty where the",
        "paper prints no number, or where a network was not trained here.",
        "",
        table_line(head),
        table_line(["---"] * len(head)),
        *lines,
        "",
    ]
