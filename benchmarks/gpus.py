"""How training and folders of photos grow with the number of GPUs of one host.

    python benchmarks/gpus.py [train batches] --data DIR --gpus 1 2 4 8 --out benchmarks/results/gpus.NAME.json
    python benchmarks/gpus.py --device cpu --gpus 1 2 --data DIR --steps 20 --images 4 40   # processes over Gloo

Each row is a command of its own under `torchrun`, as people call it. Training: images a second with the same batch on
each GPU, and what validation gives after the same number of steps with the same batch in all. Folders: images a second
from the first image to the last, without the start, of 12 megapixels and of 256x256. What limits a folder is measured
apart: how fast the host's cores, all at once, decode and encode such files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from end_to_end import drawn
from serpent_ir.system.devices import device_name, pick_device

SIZES = {"12 MP": (3000, 4000), "256": (256, 256)}
RECIPE = """\
model: serpent_l
task: photo
train: [{data}]
val: {data}
out: {out}
device: {device}
lr: 8.0e-4
val_every: {steps}
stages: [{{crop: {crop}, batch: {batch}, steps: {steps}}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["train", "batches"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--data", type=Path, help="A folder of images or a packed file; for training.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="Crops on each GPU.")
    parser.add_argument("--images", nargs=2, type=int, default=[64, 4000], help="How many of 12 MP, and of 256x256.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "device": device_name(pick_device(args.device)), "cores": os.cpu_count(), "torch": torch.__version__,
        "batch": args.batch, "crop": args.crop, "train": [], "batches": [], "cores_alone": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for part, measure in (("train", train), ("batches", batches)):
            for row in measure(args, Path(folder)) if part in args.parts else ():
                key = "cores_alone" if "decoded" in row else part
                record[key].append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(record, indent=1) + "\n")


def serpent(count: int, *words: object) -> str:
    """stdout of the command in so many processes of one host."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "serpent_ir.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE
    )
    if run.returncode:
        raise SystemExit(f"serpent {words[0]} in {count} processes ended with {run.returncode}; see above")
    return run.stdout


def train(args: argparse.Namespace, folder: Path):
    """Twice for each number of GPUs: the same batch on each, for speed, and the same in all, for the result."""
    alone = None
    for number in args.gpus:
        facts = {}
        for kind, batch in (("each", args.batch * number), ("all", args.batch * max(args.gpus))):
            out = folder / f"{kind}{number}"
            values = {
                "data": args.data.absolute(),
                "out": out,
                "device": args.device,
                "steps": args.steps,
                "crop": args.crop,
            }
            recipe = folder / f"{kind}{number}.yaml"
            recipe.write_text(RECIPE.format(**values, batch=batch))
            serpent(number, "train", recipe)
            rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
            facts[kind] = {
                "rate": statistics.median(rates[1:] or rates),
                "psnr": [r["psnr"] for r in rows if "psnr" in r][-1],
            }
        alone = alone or facts["each"]["rate"] / number
        yield {
            "gpus": number,
            "images_per_second": facts["each"]["rate"],
            "times_one": facts["each"]["rate"] / alone,
            "same_batch_images_per_second": facts["all"]["rate"],
            "same_batch_psnr": facts["all"]["psnr"],
        }


def batches(args: argparse.Namespace, folder: Path):
    for (size, shape), count in zip(SIZES.items(), args.images, strict=True):
        photos = folder / size.replace(" ", "")
        photos.mkdir()
        image = Image.fromarray(drawn(*shape))
        for index in range(count):
            image.save(photos / f"{index:04}.jpg", quality=92)
        content = (photos / "0000.jpg").read_bytes()
        yield {"size": size, **cores_alone(content, min(count, 8 * (os.cpu_count() or 1)))}
        alone = None
        for number in args.gpus:
            words = ("restore", photos, "-o", folder / f"{photos.name}-{number}", "--device", "auto", "--json")
            words = words if args.device == "cuda" else (*words[:-2], "cpu", "--json")
            told = json.loads(serpent(number, *words))
            rate = told["restored"] / told["seconds"]
            alone = alone or rate
            yield {"size": size, "gpus": number, "images_per_second": rate, "times_one": rate / alone}


def cores_alone(content: bytes, count: int) -> dict[str, float]:
    """Images a second that all cores together decode, and encode as JPEG."""
    rates = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_decode, [content] * (os.cpu_count() or 1)))
        for name, work in (("decoded", _decode), ("encoded", _encode)):
            start = time.perf_counter()
            spent = sum(pool.map(work, [content] * count))
            rates[name] = (
                count / (time.perf_counter() - start) if name == "decoded" else count / spent * (os.cpu_count() or 1)
            )
    return rates


def _decode(content: bytes) -> float:
    start = time.perf_counter()
    Image.open(BytesIO(content)).load()
    return time.perf_counter() - start


def _encode(content: bytes) -> float:
    image = Image.open(BytesIO(content))
    image.load()
    start = time.perf_counter()
    image.save(BytesIO(), "JPEG", quality=95)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
