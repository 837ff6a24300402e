"""What training data costs: batches alone, and their share of the time of a step.

    python benchmarks/data.py --data DIR [DIR ...] --out data.json [--device cpu] [--memory device host stream]

Batches alone: images per second of `TrainingSet.batch` for each task and crop, and for deblur with images in each
place. Steps: those of `serpent train`, by its own trainer (on a GPU from a CUDA graph). They are measured with one
batch kept, with batches from the Prefetcher, and with each batch made before its step on the same stream, by turns in
one run. `share` is 1 - kept / prefetched: the share of training time that data takes. `waited` is what the Prefetcher
counted.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from serpent_ir.data import Prefetcher, TrainingSet, write_pack
from serpent_ir.data.store import Memory
from serpent_ir.system.devices import device_name
from serpent_ir.train import Trainer, own_stream
from serpent_ir.training.recipe import Recipe, Stage

STAGES = {"cuda": [(64, 128), (128, 16), (256, 16)], "cpu": [(64, 8)]}  # crop, batch
MEMORY: tuple[Memory, ...] = ("device", "host", "stream")
TASKS = ("deblur", "sr8", "photo")


def seconds_of(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per run for `count` runs in a row. The device's work counts; waiting for it between runs does not."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(count):
        run()
    wait()
    return (time.perf_counter() - start) / count


def requests(batch: int, crop: int) -> Iterator[tuple[range, int]]:
    return ((range(first, first + batch), crop) for first in itertools.count(0, batch))


def measure_steps(trainer: Trainer, crop: int, batch: int, count: int, repeats: int) -> dict:
    """Milliseconds of a step with a batch that is kept, with batches made ahead, and with batches made before it."""
    images, step, device = trainer.data, trainer.train_step, trainer.device
    ahead = Prefetcher(images, requests(batch, crop), seed=0)
    samples = requests(batch, crop)
    kept = images.batch(range(batch), crop, seed=0)
    ways = {
        "kept": lambda: step(*kept),
        "prefetched": lambda: step(*next(ahead)),
        "before": lambda: step(*images.batch(next(samples)[0], crop, seed=0)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    waited = []
    for _ in range(1 + repeats):
        for name, way in ways.items():
            before = ahead.waited
            times[name].append(1000 * seconds_of(way, count, device))
            if name == "prefetched":
                waited.append((ahead.waited - before) / (times[name][-1] * count / 1000))
    row = {f"{name}_ms": statistics.median(of[1:]) for name, of in times.items()}  # the first one compiles and captures
    row |= {"share": 1 - row["kept_ms"] / row["prefetched_ms"], "waited": statistics.median(waited[1:])}
    return {**row, "images_per_second": 1000 * batch / row["prefetched_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="serpent_b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", nargs="+", default=list(MEMORY), choices=MEMORY)
    parser.add_argument("--count", type=int, default=50, help="steps or batches of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    batches, steps, count = [], [], 0
    with tempfile.TemporaryDirectory() as folder, own_stream(device):
        pack = Path(folder) / "images.serpent"
        start = time.perf_counter()
        write_pack(args.data, pack)
        packing = time.perf_counter() - start
        places: list[Memory] = args.memory if device.type == "cuda" else ["stream"]
        rounds: list[tuple[Memory, str]] = [(memory, TASKS[0]) for memory in places]
        rounds.extend((places[0], task) for task in TASKS[1:])
        stages = STAGES[device.type]
        recipe = {"model": args.model, "device": args.device, "train": [str(pack)], "val": str(pack), "out": folder}
        recipe |= {"stages": [Stage(crop, batch, 1) for crop, batch in stages]}
        for memory, task in rounds:
            trainer = Trainer(Recipe(task=task, **recipe), say=lambda line: None)
            images = trainer.data = TrainingSet([pack], trainer.degradation, device, memory=memory)
            count = len(images)
            for crop, batch in stages:
                about = {"task": task, "memory": images.store.memory, "crop": crop, "batch": batch}
                samples = requests(batch, crop)

                def make(images: TrainingSet = images, samples=samples, crop: int = crop) -> object:
                    return images.batch(next(samples)[0], crop, seed=0)

                make()
                seconds = statistics.median(seconds_of(make, args.count, device) for _ in range(args.repeats))
                batches.append({**about, "ms": 1000 * seconds, "images_per_second": batch / seconds})
                steps.append(about | measure_steps(trainer, crop, batch, args.count, args.repeats))
                for row in (batches[-1], steps[-1]):
                    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            trainer.workers.leave()
        size = pack.stat().st_size
    about = {"device": device_name(device), "torch": torch.__version__, "model": args.model, "images": count}
    packed = {"pack_seconds": packing, "pack_bytes": size}
    args.out.write_text(json.dumps({**about, **packed, "batches": batches, "steps": steps}, indent=1))


if __name__ == "__main__":
    main()
