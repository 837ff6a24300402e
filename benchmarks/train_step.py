"""Milliseconds, images per second and memory of a training step on GPUs by crop and batch, plain and as a CUDA graph.

    python benchmarks/train_step.py --data DIR [DIR ...] --out train_step.json
    torchrun --nproc-per-node 2 benchmarks/train_step.py --model serpent_h --data DIR --out train_step.2.json

A step is what `serpent train` does: its batch made beside the step before it, forward under bfloat16 autocast, L1,
backward, clipping, fused Adam, averaged weights. Batches are those of one GPU: several have so many times more, and
graphs with --graphs alone (`serpent_ir.training.workers`).
`data_ms` is a batch by itself (median over CUDA events), `ms` the mean of 20 steps after a warm-up.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from serpent_ir.recipe import Recipe, Stage
from serpent_ir.training import trainer as engine
from serpent_ir.training import workers as processes
from serpent_ir.training.plan import measure_where_it_fits
from serpent_ir.training.step import own_stream
from timing import machine, median_ms

SIZES = [(64, 128), (128, 64), (256, 16), (128, 16)]
"""Crops and batches of one GPU; the last is that of the bar on the share of data."""


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
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    parser.add_argument("--graphs", action="store_true", help="capture the steps of several, too")
    parser.add_argument("--profile", action="store_true", help="list the slowest kernels of each step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, kernels = [], {}
    folders = [str(folder) for folder in args.data]
    processes.NCCL_GRAPHS = args.graphs
    workers = processes.Workers("cuda")
    stages = [Stage(crop, batch * workers.world, 1) for crop, batch in SIZES]
    with workers.together(), own_stream(workers.device):
        for graph in (False, True) if workers.captured else (False,):
            engine.CUDA_GRAPHS = graph
            out = tempfile.mkdtemp()
            recipe = Recipe(args.model, "deblur", folders, folders[0], out, stages, recompute=args.recompute)
            trainer = engine.Trainer(recipe, workers=workers)
            for number, stage in enumerate(stages):
                row = {"model": args.model, "gpus": workers.world, "crop": stage.crop, "batch": stage.batch}
                row |= {"graph": graph, "recompute": args.recompute}
                cut = partial(trainer.data.batch, workers.share(range(stage.batch)), stage.crop, seed=0)
                if measured := measure_where_it_fits(trainer, number):
                    seconds, memory = measured
                    row |= {"ms": 1000 * seconds, "images_per_second": stage.batch / seconds, "gb": memory / 1e9}
                    row |= {"data_ms": median_ms(cut, 15, warmup=3)}
                    if args.profile and not graph:
                        kernels[str(stage.crop)] = top_kernels(partial(trainer.train_step, *cut()))
                else:
                    row |= {"ms": None, "error": "out of memory"}
                rows.append(row)
            if graph == workers.captured:
                trainer.leave()
    if not workers.first:
        return
    args.out.write_text(json.dumps({**machine(), "steps": rows, "kernels": kernels}))
    for key, names in kernels.items():
        print(key)
        for name, ms in names:
            print(f"  {ms:8.3f} ms  {name}")
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
