"""Figures of a profile, each as PNG and SVG: curves over resolution, bars by network, quality over time.

A network has the same colour (that of its family, distinguishable for colour-blind readers), marker and line style
everywhere, and its name beside it, so that no figure needs a legend.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serpent_ir.errors import OUT_OF_MEMORY, UsageError
from serpent_ir.image import replacing
from serpent_ir.profiling.rows import Rows, by_plain_call, in_order, label_of, short, was_tried, why_missing

FAMILIES = {
    "serpent": ("#0072B2", "o"),
    "unet": ("#00806A", "s"),
    "swinir": ("#C44E00", "^"),
    "restormer": ("#A03A8C", "D"),
}
_OTHER = ("#555555", "v")
LINES = {"b": "--", "32": "--", "l": "-", "24": "-", "128": "-", "h": (0, (6, 1, 1, 1))}
QUIET = "#757575"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "serpent",  # the same figure gives the same file
}
# Title, unit, function that gives the figure, and the measurement that it comes from.
PANELS: list[tuple[str, str, Callable[[dict[str, Any]], float | None], str]] = [
    ("Compute", "GMACs of one image", lambda row: row["macs"] / 1e9, ""),
    ("Training time", "seconds for 60,000 images", lambda row: row.get("train_s_per_60k"), "training"),
    ("Size", "million parameters", lambda row: row["params"] / 1e6, ""),
    ("Training memory", "GB, peak", lambda row: row["train_gb"], "training"),
    ("Inference", "ms per pass", lambda row: row.get("infer_graph_ms") or row["infer_ms"], "inference"),
]


def look_of(model: str) -> tuple[str, str, Any]:
    """Colour, marker and line style."""
    family, _, size = model.partition(".")[0].partition("_")
    return *FAMILIES.get(family, _OTHER), LINES.get(size, "-")


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches. Nothing of matplotlib's global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("drawing figures needs matplotlib: pip install 'serpent-ir[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(draw: Callable[[], Any], folder: Path, name: str) -> list[Path]:
    """Save what `draw` draws as NAME.png and NAME.svg in the folder. Returns the two files."""
    new_figure(1, 1)  # raises a clear error if matplotlib is missing
    import matplotlib

    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    with matplotlib.rc_context(STYLE):
        figure = draw()
        with replacing(files[0]) as file:
            figure.savefig(file, format="png", dpi=160)
        with replacing(files[1]) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
    return files


def over_resolution(rows: Rows, told: str) -> Any:
    """Figure 1: MACs, and memory of a training step, over the side of the image."""
    both = was_tried(rows, "training")
    figure = new_figure(11 if both else 6, 4.8)
    panels = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    side = "side of the image (pixels)"
    _curves(panels[0], rows, lambda row: row["macs"] / 1e9)
    panels[0].set_title("Compute")
    panels[0].set_ylabel("GMACs of one image (1 MAC = 2 FLOPs)")
    panels[0].set_xlabel(side)
    if both:
        crosses = _curves(panels[1], rows, lambda row: row["train_gb"])
        panels[1].set_title("Memory of a training step")
        panels[1].set_ylabel("GB, peak")
        panels[1].set_xlabel(f"{side}; a cross: out of memory at the next size" if crosses else side)
    figure.supxlabel(told, fontsize=8, color="#444444")
    return figure


def _curves(axes: Any, rows: Rows, figure_of: Callable[[dict[str, Any]], float | None]) -> bool:
    """Draw a curve for each network. Returns whether there are crosses, which mark where training memory runs out."""
    from matplotlib.ticker import NullFormatter

    absent, crosses = [], False
    ends: dict[int, list[tuple[float, str, str]]] = {}  # by size: value, name and colour
    values = []
    sizes = sorted({row["size"] for row in rows})
    for model in in_order({row["model"] for row in rows}):
        colour, marker, line = look_of(model)
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["size"])
        points = [(row["size"], value) for row in mine if (value := figure_of(row))]  # 0 has no logarithm
        if not points:
            absent.append(f"{label_of(model)}: {why_missing(mine[0], 'training')}")
            continue
        values += [value for _, value in points]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=line, ms=5, lw=1.6)
        size, value = points[-1]
        name, beyond = label_of(model), [row for row in mine if row["size"] > size]
        if beyond:
            why = why_missing(beyond[0], "training")
            if why == OUT_OF_MEMORY:
                axes.plot(size, value, marker="x", color=colour, ms=12, mew=1.6)
                crosses = True
            else:
                name += f" ({why} at {beyond[0]['size']})"
        ends.setdefault(size, []).append((value, name, colour))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _log_ticks(axes.yaxis, values)
    for size, names in ends.items():
        _name_ends(axes, size, names)
    if absent:
        told = "\n".join(["at no size:", *absent])
        axes.text(0.98, 0.02, told, transform=axes.transAxes, ha="right", va="bottom", color=QUIET, fontsize=8)
    return crosses


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Use plain numbers on a logarithmic axis, and more of them the closer the values are together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    spread = max(values) / min(values) if values else 1
    axis.set_major_locator(LogLocator(subs=(1,) if spread > 1e3 else (1, 2, 5) if spread > 5 else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_ends(axes: Any, size: int, ends: list[tuple[float, str, str]]) -> None:
    """Write names to the right of the lines' ends, at the height of the ends or as close as they fit."""
    axes.figure.draw_without_rendering()  # the limits are only known after this
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends)
    places = [to_axes.transform((size, value)) for value, _, _ in ends]
    for height, (across, _), (value, name, colour) in zip(_apart([y for _, y in places]), places, ends, strict=True):
        axes.annotate(
            name, (size, value), xytext=(across + 0.045, height), textcoords="axes fraction", color=colour,
            va="center", fontsize=8.5, annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 0},
        )  # fmt: skip


def _apart(heights: list[float], gap: float = 0.055) -> list[float]:
    """Ascending heights, moved as little as possible so that any two are at least `gap` apart."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _start(groups[-1], gap) - _start(groups[-2], gap) < gap * len(groups[-2]):
            group = groups.pop()
            groups[-1] += group
    return [_start(group, gap) + gap * i for group in groups for i in range(len(group))]


def _start(group: list[float], gap: float) -> float:
    """The height of the lowest member of a group that is centred on its heights."""
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def bars(rows: Rows, size: int, told: str) -> Any:
    """Figures 6 and 7: what each network costs at one size."""
    here = {row["model"]: row for row in rows if row["size"] == size}
    models = in_order(set(here))[::-1]
    shown = [panel for panel in PANELS if not panel[3] or was_tried(list(here.values()), panel[3])]
    figure = new_figure(2.6 * len(shown), 0.9 + 0.34 * len(models))
    stars = False
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (title, unit, figure_of, kind) in zip(panels, shown, strict=True):
        values = [figure_of(here[model]) for model in models]
        longest = max((value for value in values if value is not None), default=1)
        for place, (model, value) in enumerate(zip(models, values, strict=True)):
            colour = look_of(model)[0]
            if value is None:
                axes.text(0, place, f" {why_missing(here[model], kind)}", va="center", color=QUIET, fontsize=8)
                continue
            axes.barh(place, value, color=colour, height=0.68)
            timed = title in ("Training time", "Inference")
            star = "*" if timed and by_plain_call(here[model], list(here.values()), kind) else ""
            stars = stars or bool(star)
            axes.text(value + 0.02 * longest, place, short(value) + star, va="center", fontsize=8, color="#222222")
        axes.set_xlim(0, 1.22 * longest)
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(models)), [label_of(model) for model in models])
    for tick, model in zip(panels[0].get_yticklabels(), models, strict=True):
        tick.set_color(look_of(model)[0])
    starred = "; *: by plain calls, no CUDA graph" if stars else ""
    figure.supxlabel(f"{size}x{size} pixels. {told}{starred}", fontsize=8, color="#444444")
    return figure


def quality_over_time(points: Sequence[tuple[str, float, float]], size: int, told: str) -> Any:
    """PSNR over milliseconds. Points are (network, ms, dB)."""
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    families: dict[str, list[tuple[float, float]]] = {}
    for model, ms, psnr in points:
        families.setdefault(model.partition("_")[0], []).append((ms, psnr))
    for family, ends in families.items():
        axes.plot(*zip(*sorted(ends), strict=True), color=FAMILIES.get(family, _OTHER)[0], lw=1, alpha=0.35)
    for model, ms, psnr in points:
        colour, marker, _ = look_of(model)
        axes.plot(ms, psnr, marker, color=colour, ms=8)
        axes.annotate(
            label_of(model), (ms, psnr), xytext=(7, 5), textcoords="offset points", color=colour, fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, [ms for _, ms, _ in points])
    axes.margins(x=0.18, y=0.15)
    axes.set_title(f"Quality over time: deblur, {size}x{size} pixels")
    axes.set_ylabel("PSNR (dB); up is better")
    axes.set_xlabel("inference, milliseconds per image; left is better")
    figure.supxlabel(told, fontsize=8, color="#444444")
    return figure
