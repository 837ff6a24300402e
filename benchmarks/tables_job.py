"""What benchmarks/tables.py does in separate processes: probe a network's learning rates, or train and evaluate it.

It trains as any user would: with a recipe file, `serpent_ir.train`, and the run's log.jsonl.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from serpent_ir.data import list_images
from serpent_ir.errors import OUT_OF_MEMORY, OutOfRoomError, SerpentError
from serpent_ir.evaluate import evaluate_network
from serpent_ir.metrics import Lpips
from serpent_ir.models import create_model
from serpent_ir.system.devices import device_name, pick_device
from serpent_ir.train import open_trainer, plan
from serpent_ir.training.room import room_for
from serpent_ir.training.schedule import Schedule


@dataclass(frozen=True)
class Job:
    what: str  # "probe", "probe longer" or "train"
    model: str
    task: str
    crop: int
    batch: int
    train: list[str]  # folders or packed sets of clean images
    val: dict[str, str]  # name -> folder or packed set; the network is evaluated on all of them
    curve: str  # name of the set that is used for validation during training
    curve_images: int  # how many of its images, evenly spread
    curve_data: str  # these images, as a folder or packed set
    minutes: float
    minutes_of: str  # name of the device whose minutes they are
    probe_seconds: float
    lrs: list[float]  # learning rates to choose from; for `train`: the one to use
    seed: int
    device: str
    step_ms: float  # for the other kinds of job: what `probe` found
    first_look: int  # for `train`: steps until the first validation
    lpips_weights: str | None
    runs: str | None  # folder where runs are kept; None: they are removed
    result: str


def start(job: Job, log: Path, gpu: str | None) -> BaseProcess:
    """Start the job in a process that sees only this GPU. Its result goes to `job.result`, its output to `log`."""
    process = _FORKSERVER.Process(target=_run, args=(job, log, gpu))
    process.start()
    return process


# A job is forked from a process that has imported what jobs need but has no GPU yet. Imports would take seconds of a
# borrowed GPU's time.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["serpent_ir.train", "torch._dynamo", "matplotlib.figure"])


def _run(job: Job, log: Path, gpu: str | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(job.runs, f"{job.task}.{job.model}") if job.runs else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with room_for(lambda: OUT_OF_MEMORY):
                result = {"probe": probe, "probe longer": longer, "train": train_and_evaluate}[job.what](job, folder)
        except OutOfRoomError:
            result = {"error": OUT_OF_MEMORY}
        except SerpentError as error:
            result = {"error": str(error)}
    Path(job.result).write_text(json.dumps(result, indent=1) + "\n")


def probe(job: Job, folder: Path) -> dict[str, Any]:
    """The scores of a short run at each learning rate, and milliseconds per step, data included, in the last one."""
    # A plan's few steps tell how many make a probe. (A GPU that runs for longer is slower.)
    (stage,) = plan(_recipe(job, folder / "plan", lr=job.lrs[0], steps=1, first_look=1)).stages
    if stage.error:
        return {"error": OUT_OF_MEMORY}
    step_ms = 1e3 * stage.seconds
    probes, rows = _tried(job, folder, _steps(job.probe_seconds, step_ms))
    return {"probes": probes, "step_ms": _lasting(rows) if rows else step_ms}


def longer(job: Job, folder: Path) -> dict[str, Any]:
    """The scores of a run at each learning rate, for as many steps as are known to take the wanted time."""
    probes, _ = _tried(job, folder, _steps(job.probe_seconds, job.step_ms))
    return {"longer": probes, "step_ms": job.step_ms}


def _tried(job: Job, folder: Path, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The scores after `steps` steps at each learning rate, and the log of the last run that did not fail."""
    probes, rows = [], []
    for lr in job.lrs:
        try:
            rows = _train(job, folder / f"probe-{lr:g}", lr=lr, steps=steps, first_look=steps)
        except OutOfRoomError:  # this is so at any learning rate
            raise
        except SerpentError as error:  # for example because the learning rate is too high
            probes.append({"lr": lr, "psnr": None, "error": str(error)})
        else:
            probes.append({"lr": lr, **_score(rows)[-1]})
    return probes, rows


def train_and_evaluate(job: Job, folder: Path) -> dict[str, Any]:
    """Train for all the steps that the minutes hold, and evaluate the weights on all sets of images."""
    (lr,) = job.lrs
    run = folder / f"run-{lr:g}"
    steps = _steps(60 * job.minutes, job.step_ms)
    curve = _score(_train(job, run, lr=lr, steps=steps, first_look=job.first_look))
    device = pick_device(job.device)
    network = create_model(f"{job.model}.{job.task}", checkpoint_path=run / "weights.safetensors")
    network = network.to(device)
    lpips = Lpips(Path(job.lpips_weights), device) if job.lpips_weights else None
    evaluation = {}
    for name, images in job.val.items():
        evaluation[name] = evaluate_network(network, list_images(images), job.task, seed=job.seed, lpips=lpips)
        del evaluation[name]["images"]
    keys = ("model", "task", "crop", "batch", "minutes", "minutes_of", "probe_seconds", "seed")
    return {key: getattr(job, key) for key in keys} | {
        "device": device_name(device),
        "torch": torch.__version__,
        "params": sum(p.numel() for p in network.parameters()),
        "lr": lr,
        "step_ms": job.step_ms,
        "steps": steps,
        "images": job.batch * steps,
        "seconds": round(1e-3 * job.step_ms * steps, 1),
        "curve_set": job.curve,
        "curve_images": len(list_images(job.curve_data)),
        "curve": [
            {
                "images": job.batch * look["step"],
                "seconds": round(1e-3 * job.step_ms * look["step"], 1),
                "psnr": look["psnr"],
                "ssim": look["ssim"],
            }
            for look in curve
        ],
        "evaluation": evaluation,
    }


class Doubling(Schedule):
    """Validates after `val_every` steps, twice, four times as many, and so on, and at the end.

    That is enough for a curve over the logarithm of images, also for a fast network, which otherwise would spend its
    time on validations.
    """

    def validates(self, done: int) -> bool:
        times, rest = divmod(done, self.recipe.val_every)
        return done > 0 and (self.ends_stage(done) or (rest == 0 and times & (times - 1) == 0))


def _steps(seconds: float, ms: float) -> int:
    return max(1, round(1e3 * seconds / ms))


def _train(job: Job, out: Path, *, lr: float, steps: int, first_look: int) -> list[dict[str, Any]]:
    """Train, and return the rows of the run's log."""
    shutil.rmtree(out, ignore_errors=True)  # a run that was cut off
    with open_trainer(_recipe(job, out, lr=lr, steps=steps, first_look=first_look)) as trainer:
        trainer.schedule = Doubling(trainer.recipe, trainer.schedule.lengths)
        trainer.run()
    return [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]


def _recipe(job: Job, out: Path, *, lr: float, steps: int, first_look: int) -> Path:
    recipe = {
        "model": job.model, "task": job.task, "train": job.train, "val": job.curve_data, "out": str(out), "lr": lr,
        "keep": 1, "warmup": min(200, steps // 10), "val_every": min(first_look, steps), "seed": job.seed,
        "device": job.device, "stages": [{"crop": job.crop, "batch": job.batch, "steps": steps}],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(json.dumps(recipe, indent=1))  # JSON is also YAML
    return file


def _score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the validations of a run say about its averaged weights."""
    return [{key: row[key] for key in ("step", "psnr", "ssim")} for row in rows if row.get("psnr") is not None]


def _lasting(rows: list[dict[str, Any]]) -> float:
    """Milliseconds per step from a run's log, without its first steps, which compile and capture, if there are more."""
    timed = [(row["step"], row["ms"]) for row in rows if "ms" in row]
    counts = [step - before for (step, _), before in zip(timed, [0, *(step for step, _ in timed)], strict=False)]
    skip = counts[0] if 2 * counts[0] <= timed[-1][0] else 0
    kept = [(n, ms) for n, (step, ms) in zip(counts, timed, strict=True) if step > skip]
    return sum(n * ms for n, ms in kept) / sum(n for n, _ in kept)
