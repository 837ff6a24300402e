"""Tables 1 and 2 of the paper at our scale: all networks are trained for the same minutes of one device, and compared.

    python benchmarks/tables.py --out runs/tables [--data ../shared/data] [--minutes 2.5] [--gpus 2] [--at-once 3]

Images are decoded once, into packed sets. For each task, `deblur` and then `sr8`, these steps follow:

1. Every network has a GPU to itself for short runs at two learning rates (the paper's and a neighbour). These runs tell
   how many steps the minutes hold.
2. Both rates run once more, three times as long. The better rate is chosen by PSNR on some validation images.
3. Each network trains for that many steps at one crop size (in the paper SwinIR has no progressive stages, and images
   of one size can be counted). The learning rate falls to zero at the end. The network is evaluated on three sets.

Since the steps are fixed once they are timed, --at-once runs may then share a GPU: minutes and seconds are always steps
times the time that one step took alone. Rows at equal numbers of images come from the validations of the same runs, at
the number that the slowest network reached; the other networks' learning rates have not fallen to zero by then.

What is already in --out is not done again. After an interruption, or with --time-limit, the same command continues. (A
row whose rate was chosen by short runs alone stays if the longer runs choose the same rate. Otherwise the other rate is
trained too, and the better of both runs counts.) With other --minutes new tables are added beside the old ones, from
the same short runs. Other settings are refused. Since the first short runs fix the steps, the training device may
differ from the one whose minutes they are: with --minutes-of and that device's name, this device continues from the
short runs that were made there, and makes only the longer ones.

--out receives results.json, which `serpent report --from` reads, and results.md. This is a benchmark and not a command
of `serpent`, because it is about these networks, these data and these tables, and needs the repository beside it.
"""

import argparse
import dataclasses
import json
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tables_job
from serpent_ir.data import write_pack
from serpent_ir.errors import OUT_OF_MEMORY, SerpentError
from serpent_ir.image.folders import find_images
from serpent_ir.metrics import Lpips
from serpent_ir.models import list_models
from serpent_ir.profiling.paper import NAMES
from serpent_ir.profiling.rows import in_order
from serpent_ir.system.devices import device_name, pick_device
from tables_job import Job
from tables_kept import done, is_here, place_of, rates, read, settings, settled, timed, told, undecided, unprobed, write
from tables_report import LONGER, render

VAL = ("faces256/val", "faces512/val", "natural/val")
# Crop, batch, folders of training images, and the validation set that is used during training.
TASKS: dict[str, tuple[int, int, tuple[str, ...], str]] = {
    "deblur": (128, 8, ("faces256/train", "natural/train"), "faces256/val"),
    "sr8": (192, 4, ("faces512/train", "faces256/train", "natural/train"), "faces512/val"),
}
EXTRA = 30  # seconds that a job takes besides training: imports, captures, validation, evaluation


def main() -> None:
    args = arguments()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.time_limit
    jobs = [job_of(task, args) for task in args.tasks]
    refuse_what_cannot_be(jobs, args.networks, args.lrs, folder)
    with tempfile.TemporaryDirectory() as temporary:
        devices = Devices(args.gpus, args.at_once, args.device, Path(temporary))
        failed = []
        for job in jobs:
            failed += run_task(job, args.networks, args.lrs, folder, devices, until)
            write_results(folder)
    print(render(read(folder / "results.json")["runs"]))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries again")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument(
        "--data", default="../shared/data", help=f"folder with {', '.join(VAL)} and their train folders"
    )
    parser.add_argument("--train", nargs="+", help="other training images: folders, or whatever a recipe takes")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--networks", nargs="+", default=[name for name in NAMES if name in list_models()])
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, for each network")
    parser.add_argument(
        "--minutes-of", metavar="DEVICE", help='whose minutes, as results name it ("NVIDIA H200"); default: this device'
    )
    parser.add_argument("--probe-seconds", type=float, default=10, help="of training at each learning rate, to time it")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates to choose from, for all networks")
    parser.add_argument("--crop", type=int, help="side of the training images")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="GPUs to use, a network on each")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share a GPU, once all is timed")
    parser.add_argument("--device", default="auto", help="cpu: use no GPU")
    parser.add_argument("--curve-images", type=int, default=25, help="validation images that are looked at in training")
    parser.add_argument("--lpips-weights", help="torchvision's alexnet-owt-7be5be79.pth or vgg16-397923af.pth")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, help="seconds after which nothing is to be going on"
    )
    parser.add_argument("--keep-runs", help="folder for runs and weights, which are thrown away otherwise")
    args = parser.parse_args()
    if not (0 < args.minutes < math.inf and 0 < args.probe_seconds < math.inf):
        parser.error("--minutes and --probe-seconds must be above zero, and finite")
    if any(number is not None and number < 1 for number in (args.crop, args.batch)):
        parser.error("--crop and --batch must be at least 1")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out}: is no folder")
    unknown = [name for name in args.networks if name not in list_models()]
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; valid: {', '.join(list_models())}")
    if args.gpus > torch.cuda.device_count():
        parser.error(f"--gpus {args.gpus}: there are {torch.cuda.device_count()}")
    return args


def job_of(task: str, args: argparse.Namespace) -> Job:
    """The part that all jobs of a task have in common."""
    crop, batch, sets, curve = TASKS[task]
    data = Path(args.data)
    return Job(
        what="probe", model="", task=task, crop=args.crop or crop, batch=args.batch or batch,
        train=args.train or [str(data / name) for name in sets], val={name: str(data / name) for name in VAL},
        curve=curve, curve_images=args.curve_images, curve_data="", minutes=args.minutes,
        minutes_of=args.minutes_of or device_name(pick_device(args.device)),
        probe_seconds=args.probe_seconds, lrs=[], seed=args.seed, device=args.device,
        step_ms=0, first_look=0, lpips_weights=args.lpips_weights,
        runs=args.keep_runs, result="",
    )  # fmt: skip


def refuse_what_cannot_be(jobs: list[Job], networks: list[str], lrs: list[float] | None, folder: Path) -> None:
    """Exit with one line if something would fail after minutes of training, or would mix results of other settings."""
    try:
        for images in {path for job in jobs for path in job.val.values()}:
            find_images(Path(images))
        if jobs[0].lpips_weights:
            Lpips(Path(jobs[0].lpips_weights), torch.device("cpu"))
    except SerpentError as error:
        sys.exit(f"tables.py: error: {error}")
    for job in jobs:
        for file in sorted(place_of(job, folder).glob("*.json")):
            now = settings(job, rates(file.name.split(".")[0], lrs))
            before = read(file).get("settings", {})
            if settled(file) and (other := [key for key in now if before.get(key) != now[key]]):
                told = "; ".join(f"{key} {before.get(key, 'not noted')}, now {now[key]}" for key in other)
                device = before.get("device") if "device" in other else None
                way = "give another --out or remove it" + (f", or give --minutes-of {device!r}" if device else "")
                sys.exit(f"tables.py: error: {file}: of other settings ({told}); {way}")
    lacking = [
        f"{job.task} {name}" for job in jobs if not is_here(job) for name in unprobed(job, networks, lrs, folder)
    ]
    if lacking:
        sys.exit(
            f"tables.py: error: {folder} has no probe on {jobs[0].minutes_of} with these settings of "
            f"{', '.join(lacking)}; call there without --minutes-of, or leave them out by --networks"
        )


class Devices:
    """Queues jobs for a GPU (or for the CPU, which counts as one).

    Each runs in a process that sees only that device.
    """

    def __init__(self, gpus: int, at_once: int, device: str, temporary: Path):
        self.count = 1 if device == "cpu" or gpus < 1 else gpus
        self.at_once = max(1, at_once)
        self.temporary = temporary
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        named = self.count > 1 or (visible and device != "cpu")
        self.all = visible.split(",")[: self.count] if named else [None]
        self.free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._number, self._lock = 0, threading.Lock()

    def share_out(self, work: Callable[[Any], None], items: list[Any], at_once: int = 1) -> None:
        """Do the work for every item, with `at_once` items at a time on each device."""
        self.free = queue.SimpleQueue()
        for device in self.all * at_once:
            self.free.put(device)
        with ThreadPoolExecutor(self.count * at_once) as pool:
            list(pool.map(work, items))

    def __call__(self, job: Job, log: Path, until: float, takes: float) -> dict[str, Any] | None:
        """The job's result; None if it would end after `until`. What it prints is appended to `log`."""
        gpu = self.free.get()
        try:
            if time.monotonic() + takes > until:
                return None
            with self._lock:
                self._number += 1
                place = self.temporary / f"{self._number}.json"
            job = dataclasses.replace(job, result=str(place))
            process = tables_job.start(job, log, gpu)
            process.join()
            if not place.exists():
                return {"error": f"ended with status {process.exitcode}; see {log}"}
            return read(place)
        finally:
            self.free.put(gpu)


def run_task(
    job: Job, networks: list[str], lrs: list[float] | None, folder: Path, devices: Devices, until: float
) -> list[str]:
    """Do what is missing for a task, as far as time allows. Returns the networks for which something failed."""
    place = place_of(job, folder)
    place.mkdir(exist_ok=True)
    wanted = [name for name in in_order(set(networks)) if not done(place / f"{name}.json")]
    for name in networks:
        if name not in wanted:
            say(f"{job.task} {name}: done already ({place / name}.json)")
    if not wanted or time.monotonic() > until:
        return []
    packed, at_once, failed = _packed(job, devices.temporary), devices.at_once, []

    def probe(name: str) -> None:
        probing = dataclasses.replace(packed, model=name, lrs=rates(name, lrs))
        takes = EXTRA + job.probe_seconds * len(probing.lrs)
        run(probing, f"{name}.probe.json", takes, settings(job, probing.lrs))

    def about(name: str) -> dict[str, Any]:
        # PyTorch in these settings is the version with which the steps were timed; a row has the version of its
        # training.
        return probed[name]["settings"] | settings(job, rates(name, lrs))

    def probe_longer(name: str) -> None:
        found = probed[name]
        probing = dataclasses.replace(
            packed, what="probe longer", model=name, lrs=[each["lr"] for each in found["probes"]],
            probe_seconds=LONGER * job.probe_seconds, step_ms=found["step_ms"],
        )  # fmt: skip
        takes = EXTRA + probing.probe_seconds * len(probing.lrs) * min(at_once, len(open_rates))
        run(probing, f"{name}.longer.json", takes, about(name))

    def chosen(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        found = probed[name]
        tried = [each for each in found.get("longer", []) if each["psnr"] is not None] or found["probes"]
        best = max(tried, key=lambda each: each["psnr"] or -math.inf)
        return best, {"longer": found["longer"]} if "longer" in found else {}

    def stays(name: str) -> bool:
        """Whether there is a row, and the longer runs choose the same rate as it has. If so, the row records that."""
        file = place / f"{name}.json"
        best, longer = chosen(name)
        if not settled(file) or (row := read(file))["lr"] != best["lr"]:
            return False
        write(file, json.dumps({**row, **longer}, indent=1) + "\n")
        say(f"{job.task} {name}: stays as it is, longer runs choose no other learning rate")
        return True

    def train(name: str) -> None:
        found = probed[name]
        best, longer = chosen(name)
        training = dataclasses.replace(
            packed, what="train", model=name, lrs=[best["lr"]], step_ms=found["step_ms"], first_look=fewest
        )
        # Sharing a GPU gains little: five jobs that began together ended together, after five times as long. For
        # another device's minutes this is a guess, since it is not known how much faster or slower this device is.
        takes = (EXTRA + 60 * job.minutes) * min(at_once, len(ready))
        run(training, f"{name}.json", takes, about(name), train=told(job.train), probes=found["probes"], **longer)

    def run(one: Job, file: str, takes: float, made_with: dict[str, Any], **more: Any) -> None:
        result = devices(one, place / f"{one.model}.log", until, takes)
        if result is None:
            say(f"{job.task} {one.model}: no time left to {one.what}")
            return
        if one.what != "probe" and at_once > 1 and result.get("error") == OUT_OF_MEMORY:
            result = {"error": "out of memory beside others; call again with a lower --at-once"}
        result = result if "error" in result else {**result, **more}
        if result.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY:
            failed.append(one.model)
        if settled(place / file):  # a row of the other learning rate
            if "error" in result:
                say(f"{job.task} {one.model}: {result['error']}")
                return
            result = better_of(result, read(place / file))
        _keep(result, place / file, one, made_with)

    devices.share_out(probe, unprobed(job, wanted, lrs, folder))
    probed = timed(job, lrs, folder)
    open_rates = [name for name in wanted if name in probed and undecided(probed[name])]
    devices.share_out(probe_longer, open_rates, at_once)
    probed = timed(job, lrs, folder)
    # Also validate at the last step of the slowest network, where networks are compared. All networks that were ever
    # probed count, since another call may train them.
    fewest = min((max(1, round(60e3 * job.minutes / found["step_ms"])) for found in probed.values()), default=1)
    ready = [name for name in wanted if name in probed and not undecided(probed[name]) and not stays(name)]
    ready.sort(key=lambda name: -probed[name]["step_ms"])
    devices.share_out(train, ready, at_once)
    return failed


def better_of(new: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """Of two whole runs at different learning rates the better one, with the score of the other."""
    better, other = sorted((new, former), key=lambda run: run["curve"][-1]["psnr"], reverse=True)
    other = {key: other["curve"][-1][key] for key in ("psnr", "ssim")} | {"lr": other["lr"]}
    return {**better, "longer": new["longer"], "also": other}


def _packed(job: Job, folder: Path) -> Job:
    """The job with packed sets, made in `folder`, instead of its images."""

    def pack(sources: list[str], name: str) -> str:
        file = folder / f"{name.replace('/', '.')}.serpent"
        if not file.exists():
            say(f"packing {', '.join(sources)}")
            write_pack(sources, file)
        return str(file)

    some = folder / f"{job.task}.curve"
    files = find_images(Path(job.val[job.curve]))
    some.mkdir()
    for i in range(min(job.curve_images, len(files))):
        file = files[i * len(files) // min(job.curve_images, len(files))]
        shutil.copy(file, some / f"{i:04d}{file.suffix}")
    val = {name: pack([source], name) for name, source in job.val.items()}
    train, curve = pack(job.train, f"{job.task}.train"), pack([str(some)], some.name)
    return dataclasses.replace(job, train=[train], val=val, curve_data=curve)


def _keep(result: dict[str, Any], file: Path, job: Job, about: dict[str, Any]) -> None:
    name = job.model
    if "error" in result:
        result = {"model": name, "task": job.task, "minutes": job.minutes, **result}
        say(f"{job.task} {name}: {result['error']}")
    elif "curve" not in result:
        probes = result.get("longer") or result["probes"]
        tried = ", ".join(f"{p['psnr']:.2f} dB at {p['lr']:g}" for p in probes if p["psnr"])
        say(f"{job.task} {name}: by {job.probe_seconds:g} s at {result['step_ms']:.1f} ms a step {tried}")
    else:
        last = result["curve"][-1]
        say(f"{job.task} {name}: lr {result['lr']:g}, {last['images']} images, {last['psnr']:.2f} dB")
    write(file, json.dumps({**result, "settings": about}, indent=1) + "\n")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_results(folder: Path) -> None:
    """Write results.json and results.md from everything in the folder."""
    short = {file for end in ("probe", "longer") for file in folder.glob(f"*min/*.{end}.json")}
    # If the short runs failed and there is no row, this says why.
    rows = set(folder.glob("*min/*.json")) - short
    why = {
        file
        for file in short
        if "error" in read(file) and file.with_name(f"{file.name.split('.')[0]}.json") not in rows
    }
    files = sorted(rows | why)
    runs = [read(file) for file in files]
    write(folder / "results.json", json.dumps({"runs": runs}, indent=1) + "\n")
    write(folder / "results.md", render(runs))


if __name__ == "__main__":
    try:
        main()
    except SerpentError as error:
        sys.exit(f"tables.py: error: {error}")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        sys.exit(130)
