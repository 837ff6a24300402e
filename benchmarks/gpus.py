"""Images per second of training on one GPU and on several of a host, at a fixed batch for each of them.

    python benchmarks/gpus.py --data DIR --gpus 2 --out gpus.json

One process alone trains on one GPU, torchrun's on several; a step is what `serpent train` does, with its data. `graph`
says whether it was replayed from a CUDA graph: of several it is with --graphs alone (`serpent_ir.training.workers`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from serpent_ir.passes import device_name
from serpent_ir.recipe import Recipe, Stage
from serpent_ir.train import GraphedStep, Trainer, own_stream
from serpent_ir.training import workers as processes
from serpent_ir.training.plan import measure_stage


def measure(args: argparse.Namespace) -> None:
    """What each of the processes does; the first prints a line of JSON."""
    processes.NCCL_GRAPHS = args.graphs
    workers = processes.Workers(args.device)
    stage = Stage(args.crop, args.batch * workers.world, 1)
    recipe = Recipe(args.model, "deblur", args.data, args.data[0], tempfile.mkdtemp(), [stage])
    with workers.together(), own_stream(workers.device):
        trainer = Trainer(recipe, workers=workers)
        seconds, memory = measure_stage(trainer, stage)
        graph = isinstance(trainer.call, GraphedStep) and trainer.call.graph is not None
        trainer.leave()
    row = {"gpus": workers.world, "graph": graph, "ms": 1000 * seconds, "images_per_second": stage.batch / seconds}
    if workers.first:
        print(json.dumps({**row, "gb": memory / 1e9, "device": device_name(workers.device)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", default="serpent_h")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="of each GPU")
    parser.add_argument("--device", default="cuda", help="cpu to try this file out")
    parser.add_argument("--graphs", action="store_true", help="capture the steps of several, too")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    calls = [[sys.executable, *how, *sys.argv, "--measure"] for how in ([], several)]
    rows = [json.loads(subprocess.check_output(call, text=True).splitlines()[-1]) for call in calls]
    ratio = rows[1]["images_per_second"] / rows[0]["images_per_second"]
    told = {"torch": torch.__version__, "model": args.model, "crop": args.crop, "batch": args.batch, "ratio": ratio}
    args.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
    print(*rows, f"{args.gpus} GPUs make {ratio:.2f} times the images of one", sep="\n")


if __name__ == "__main__":
    main()
