"""Milliseconds, images per second and memory of a training step by crop and batch, and the speed-up by several GPUs.

    python benchmarks/train_step.py --data DIR [DIR ...] --out train_step.json
    python benchmarks/train_step.py --data DIR --sizes 128x16 --gpus 1 2 --out gpus.json      # the ratio alone
    python benchmarks/train_step.py --data DIR --tiny --out tiny.json                         # tries this file on a CPU
    python benchmarks/train_step.py --loops --out plain_loop.json     # loops of one's own instead, see plain_loop.py

A step is what `serpent train` does: its batch is made during the step before; forward under bfloat16 autocast, L1,
backward, clipping, fused Adam, averaged weights. It is measured on one GPU and, by torchrun, on all of this machine's,
with the same work for each; without CUDA graphs, and from them as `serpent train` runs it.

`ms` is the mean of 20 steps after a warm-up, `data_ms` the time of a batch by itself (median over CUDA events). `batch`
is that of all GPUs. A ratio is the images per second of several GPUs divided by those of one GPU, with the same batch
per GPU. `ratio` is for steps as `serpent train` runs them, `ratio_plain` for both without graphs.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plain_loop
from serpent_ir.training import trainer as engine
from serpent_ir.training import workers as processes
from serpent_ir.training.plan import measure_where_it_fits
from serpent_ir.training.recipe import Recipe, Stage
from serpent_ir.training.step import own_stream
from timing import machine, median_ms

SIZES = [(64, 128), (128, 64), (256, 16), (128, 16)]
"""Crop and batch of one GPU. The last pair is that of the targets for the share of data and for several GPUs."""

TINY: dict[str, Any] = {"model": "serpent_b", "model_options": {"dim": 8, "blocks": [1, 1]}, "device": "cpu"}


def cutter(trainer: engine.Trainer, number: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that makes this process's share of a batch of a stage."""
    stage = trainer.recipe.stages[number]
    return partial(trainer.data.batch, trainer.workers.share(range(stage.batch)), stage.crop, seed=0)


def top_kernels(trainer: engine.Trainer, number: int, count: int = 14) -> list[tuple[str, float]]:
    """Names and milliseconds of the kernels that take most of the time of one step of a stage."""
    from torch.profiler import ProfilerActivity, profile

    batch = cutter(trainer, number)()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        trainer.train_step(*batch)
        torch.cuda.synchronize()
    rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
    return [(e.key[:90], e.self_device_time_total / 1000) for e in rows[:count]]


def measure(args: argparse.Namespace) -> None:
    """What each process does. The first one writes its rows as JSON."""
    recipe: dict[str, Any] = TINY if args.tiny else {"model": args.model, "device": "cuda"}
    workers = processes.Workers(recipe["device"])
    stages = [Stage(crop, batch * workers.world, 1) for crop, batch in args.sizes]
    recipe |= {"task": "deblur", "train": args.data, "val": args.data[0], "out": tempfile.mkdtemp(), "stages": stages}
    captured = workers.device.type == "cuda"
    rows, kernels = [], {}
    with workers.together(), own_stream(workers.device):
        for engine.CUDA_GRAPHS in (False, True) if captured else (False,):
            trainer = engine.Trainer(Recipe(recompute=args.recompute, **recipe), workers=workers)
            for number in range(len(stages)):
                rows.append(measure_row(trainer, number))
                if args.profile and rows[-1]["ms"] and not engine.CUDA_GRAPHS:
                    kernels[f"{workers.world} x {stages[number].crop}"] = top_kernels(trainer, number)
            del trainer  # its memory must not count for the next one
            gc.collect()
        workers.leave()
    if workers.first:
        args.measure.write_text(json.dumps({**machine(workers.device.type), "steps": rows, "kernels": kernels}))


def measure_row(trainer: engine.Trainer, number: int) -> dict[str, Any]:
    """The figures of a stage."""
    recipe, workers, stage = trainer.recipe, trainer.workers, trainer.recipe.stages[number]
    row = {"model": recipe.model, "gpus": workers.world, "crop": stage.crop, "batch": stage.batch}
    measured = measure_where_it_fits(trainer, number)
    graph = bool(trainer.graphs) and all(part.graph is not None for part in trainer.graphs)
    row |= {"graph": graph, "recompute": recipe.recompute}
    if measured is None:
        return row | {"ms": None, "images_per_second": None, "error": "out of memory"}
    seconds, memory = measured
    row |= {"ms": 1000 * seconds, "images_per_second": stage.batch / seconds, "gb": memory / 1e9}
    return row | {"data_ms": median_ms(cutter(trainer, number), 15, warmup=3)}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of several GPUs to one, for each crop and batch per GPU; null if one of the two does not fit."""
    plain, best = ({}, {})
    for row in rows:
        place = row["crop"], row["batch"] // row["gpus"], row["gpus"]
        best[place] = row["images_per_second"]  # the last row is as `serpent train` runs it
        plain.setdefault(place, row["images_per_second"])
    found = []
    for crop, batch, gpus in best:
        one = crop, batch, 1
        row: dict[str, Any] = {"gpus": gpus, "crop": crop, "batch_of_each": batch}
        for name, rates in (("ratio", best), ("ratio_plain", plain)):
            several, alone = rates[crop, batch, gpus], rates.get(one)
            row[name] = several / alone if several and alone else None
        found += [row] if gpus > 1 else []
    return found


def size(text: str) -> tuple[int, int]:
    crop, batch = text.split("x")
    return int(crop), int(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--loops", nargs="*", metavar="MODEL", help="plain loops around these models; by default six")
    parser.add_argument("--model", default="serpent_h")
    parser.add_argument("--sizes", nargs="+", type=size, metavar="CROPxBATCH", help="of each GPU")
    parser.add_argument("--gpus", nargs="+", type=int, help="how many; by default 1 and all that are here")
    parser.add_argument("--recompute", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--profile", action="store_true", help="list the slowest kernels of each step")
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU, in one process and in two")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loops is not None:
        how = plain_loop.TINY if args.tiny else plain_loop.FULL
        rows = plain_loop.measure_loops(tuple(args.loops) or plain_loop.MODELS, how)
        args.out.write_text(json.dumps({**machine("cpu" if args.tiny else "cuda"), "loops": rows}, indent=1) + "\n")
        show(rows)
        return
    if not args.data:
        parser.error("--data DIR: folders of images to train on")
    args.sizes = args.sizes or ([(16, 4)] if args.tiny else SIZES)
    if args.measure:
        measure(args)
        return
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/train_step.py times GPUs: no CUDA device here; --tiny tries it on a CPU")
    counts = args.gpus or sorted({1, 2 if args.tiny else torch.cuda.device_count()} - {0})
    record: dict[str, Any] = {"steps": [], "kernels": {}}
    for count in counts:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measured.json"
            how = torchrun if count > 1 else []
            ended = subprocess.run([sys.executable, *how, *sys.argv, "--measure", str(file)])
            if ended.returncode:
                sys.exit(f"{count} process(es) ended with status {ended.returncode}; see what they said")
            found = json.loads(file.read_text())
        record = {**found, "steps": record["steps"] + found["steps"], "kernels": record["kernels"] | found["kernels"]}
    record["ratios"] = ratios(record["steps"])
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for key, names in record["kernels"].items():
        print(key)
        for name, ms in names:
            print(f"  {ms:8.3f} ms  {name}")
    show([*record["steps"], *record["ratios"]])


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
