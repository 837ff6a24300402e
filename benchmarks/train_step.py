"""Milliseconds and memory of one training step on a GPU by crop and batch, plain and as a CUDA graph, and of its data.

    python benchmarks/train_step.py --data DIR [DIR ...] --out train_step.json

Each figure is a median over CUDA events after a warm-up, all in one run. A step is what `serpent train` does: a batch
cut and degraded on the device, forward under bfloat16 autocast, L1, backward, clipping, fused Adam, averaged weights.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from serpent_ir import train
from serpent_ir.recipe import Recipe, Stage

STAGES = [Stage(64, 128, 1), Stage(128, 64, 1), Stage(256, 16, 1)]


def median_ms(run, warmup: int, repeats: int) -> float:
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def top_kernels(run, count: int = 14) -> list[tuple[str, float]]:
    """Names and milliseconds of the kernels that take most of one run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
    return [(e.key[:90], e.self_device_time_total / 1000) for e in rows[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="serpent_l")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="list the slowest kernels of each step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, kernels = [], {}
    folders = [str(folder) for folder in args.data]
    for graph in (False, True):
        train.CUDA_GRAPHS = graph
        recipe = Recipe(args.model, "deblur", folders, folders[0], tempfile.mkdtemp(), STAGES)
        with train.own_stream(torch.device("cuda")):
            trainer = train.Trainer(recipe)
            for stage in STAGES:
                step = partial(trainer._train_step, stage, 0)
                cut = partial(trainer.cache.batch, range(stage.batch), stage.crop, seed=0)
                median_ms(step, 0, 5)  # compiles, and captures
                torch.cuda.reset_peak_memory_stats()
                row = {"model": args.model, "crop": stage.crop, "batch": stage.batch, "graph": graph}
                row |= {"ms": median_ms(step, 1, args.repeats), "data_ms": median_ms(cut, 1, args.repeats)}
                rows.append(row | {"gb": torch.cuda.max_memory_allocated() / 1e9})
                if args.profile and not graph:
                    kernels[str(stage.crop)] = top_kernels(step)
    device = torch.cuda.get_device_name()
    args.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "steps": rows, "kernels": kernels}))
    for key, names in kernels.items():
        print(key)
        for name, ms in names:
            print(f"  {ms:8.3f} ms  {name}")
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
