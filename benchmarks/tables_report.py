"""results.md of benchmarks/tables.py."""

import math
from typing import Any

from serpent_ir.profiling.rows import in_order, label_of

LONGER = 3  # the runs that choose a learning rate are this many times as long as those that time a network's steps


def render(runs: list[dict[str, Any]]) -> str:
    """results.md: for each task and budget, a table at equal minutes and one at equal images."""
    lines = ["# The paper's Tables 1 and 2 at our scale", "", "Written by `benchmarks/tables.py`; do not edit.", ""]
    for task in sorted({run["task"] for run in runs}):
        for minutes in sorted({run["minutes"] for run in runs if run["task"] == task}):
            here = {run["model"]: run for run in runs if (run["task"], run["minutes"]) == (task, minutes)}
            lines += _tables(task, minutes, [here[name] for name in in_order(set(here))])
    return "\n".join(lines)


def _tables(task: str, minutes: float, runs: list[dict[str, Any]]) -> list[str]:
    done = [run for run in runs if "error" not in run]
    lines = [f"## {task}, {minutes:g} minute{'s' * (minutes != 1)} a network", ""]
    measured = any("lpips" in figures for run in done for figures in run["evaluation"].values())
    lpips = "LPIPS" if measured else "LPIPS (no weights given: --lpips-weights)"
    if done:
        one = done[0]
        timed_with = ", ".join(sorted({run["settings"]["torch"] for run in done}))
        how = f"crops of {one['crop']}, batch {one['batch']}, seed {one['seed']}"
        lines += [
            f"Minutes of {_whose(one)}, PyTorch {timed_with}; {how}.",
            f"Training images: {', '.join(one['train'])}.",
            f"Learning rate: the better of those named, by {_chosen_by(done)}.",
            "Minutes: the steps times what one takes a network that has the device to itself.",
            *_timed_otherwise(done),
            *_trained_on(done),
            "",
        ]
    for name in done[0]["evaluation"] if done else ():
        degraded = next(run["evaluation"][name] for run in done)
        lines += [
            f"Equal minutes, {name} ({degraded['n']} images; degraded: {degraded['input_psnr']:.2f} dB, "
            f"SSIM {degraded['input_ssim']:.4f}):",
            "",
            *_head("network", "PSNR", "SSIM", lpips, "minutes", "images", "lr", "of"),
        ]
        for run in done:
            figures = run["evaluation"][name]
            distance = f"{figures['lpips']:.4f}" if "lpips" in figures else "-"
            tried = ", ".join(f"{p['lr']:g}" + ("" if p["psnr"] else " (failed)") for p in run["probes"])
            lines.append(
                f"| {label_of(run['model'])} | {figures['psnr']:.2f} | {figures['ssim']:.4f} "
                f"| {distance} | {run['seconds'] / 60:.2f} "
                f"| {run['images']:,} | {run['lr']:g} | {tried or '-'} |"
            )
        lines.append("")
    if done:
        slowest = min(done, key=lambda run: run["images"])
        lines += [
            f"Equal images: at {slowest['images']:,}, which is as far as {label_of(slowest['model'])} came, on "
            f"{slowest['curve_images']} images of {slowest['curve_set']}; the other networks' learning rates were not",
            "yet down.",
            "",
            *_head("network", "PSNR", "SSIM", "minutes"),
        ]
        for run in done:
            at = at_images(run["curve"], slowest["images"])
            cells = f"{at['psnr']:.2f} | {at['ssim']:.4f} | {at['seconds'] / 60:.2f}" if at else "- | - | -"
            lines.append(f"| {label_of(run['model'])} | {cells} |")
        lines.append("")
    lines += [f"{label_of(run['model'])}: {run['error']}\n" for run in runs if "error" in run]
    return lines


def _whose(run: dict[str, Any]) -> str:
    """The device whose minutes they are. In older rows that is always the device that trained."""
    return run.get("minutes_of", run["device"])


def _chosen_by(runs: list[dict[str, Any]]) -> str:
    """What chose the learning rates: runs of some seconds (until November 2026 short ones, where rates differed), or
    whole runs, where longer runs chose another rate than shorter ones had chosen."""
    networks: dict[float, list[str]] = {}
    twice = [run for run in runs if "also" in run]
    for run in [run for run in runs if "also" not in run]:
        longer = any(each["psnr"] is not None for each in run.get("longer", []))
        seconds = run["probe_seconds"] * (LONGER if longer else 1)
        networks.setdefault(seconds, []).append(label_of(run["model"]))
    named = len(networks) > 1
    ways = [f"{seconds:g} s each" + f" for {', '.join(networks[seconds])}" * named for seconds in sorted(networks)]
    if twice:
        told = [
            f"{label_of(run['model'])} ({run['curve'][-1]['psnr']:.2f} dB at {run['lr']:g}, "
            f"{run['also']['psnr']:.2f} at {run['also']['lr']:g})"
            for run in twice
        ]
        place = f"{twice[0]['curve_images']} images of {twice[0]['curve_set']}"
        ways.append(f"whole runs at both, on {place}: {', '.join(told)}")
    return "; by ".join(ways)


def _timed_otherwise(runs: list[dict[str, Any]]) -> list[str]:
    """The networks whose minutes are not steps times a step's time: until November 2026 a run was timed as a whole."""
    whole = [label_of(run["model"]) for run in runs if run["seconds"] > 0.1 + 1.01e-3 * run["step_ms"] * run["steps"]]
    return [f"{', '.join(whole)}: the minutes that the run itself took."] if whole else []


def _trained_on(runs: list[dict[str, Any]]) -> list[str]:
    """Which networks were trained on which device, unless all were trained on the one whose minutes they are."""
    networks: dict[str, list[str]] = {}
    for run in runs:
        networks.setdefault(f"on {run['device']} (PyTorch {run['torch']})", []).append(label_of(run["model"]))
    if all(run["device"] == _whose(run) for run in runs):
        return []
    told = "; ".join(f"{place}: {', '.join(names)}" for place, names in networks.items())
    return [f"Trained {told}.", f"Their steps are those that {_whose(runs[0])} makes in the minutes."]


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def at_images(curve: list[dict[str, Any]], images: int) -> dict[str, float] | None:
    """A curve's values at a number of images: between two validations, on the line over the logarithm of images."""
    before = [point for point in curve if point["images"] <= images]
    after = [point for point in curve if point["images"] >= images]
    if not before or not after:
        return None
    a, b = before[-1], after[0]
    if a["images"] == b["images"]:
        return a
    share = math.log(images / a["images"]) / math.log(b["images"] / a["images"])
    return {key: a[key] + share * (b[key] - a[key]) for key in ("psnr", "ssim", "seconds")}
