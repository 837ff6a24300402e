"""What benchmarks/tables.py does in a process of its own: time a step of networks; or probe, train and evaluate one.

    python benchmarks/tables_job.py JOB.json        # a `Job`; the result goes to its file `result`

It knows of training what anybody does: `serpent_ir.train.train` of a recipe file, and the run's log.jsonl.
"""

import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serpent_ir.data import list_images
from serpent_ir.errors import OUT_OF_MEMORY, OutOfRoomError, SerpentError
from serpent_ir.evaluate import evaluate_network
from serpent_ir.metrics import Lpips
from serpent_ir.models import create_model
from serpent_ir.passes import device_name, pick_device
from serpent_ir.train import plan, train
from serpent_ir.training.room import room_for


@dataclass(frozen=True)
class Job:
    what: str  # "time" or "train"
    models: list[str]  # of `train`: one
    task: str
    crop: int
    batch: int
    train: list[str]  # folders or packed sets of clean images
    val: dict[str, str]  # name -> folder or packed set; the network is evaluated on all of them
    curve: str  # name of the one that is looked at during training
    curve_images: int  # of it, evenly spread
    curve_data: str  # these, as a folder or packed set
    minutes: float
    probe_seconds: float
    lrs: list[float]  # of `train`: to choose from; of `time`: one of each network
    seed: int
    device: str
    step_ms: float  # of `train`: what `time` found
    val_every: int  # of `train`: steps
    lpips_weights: str | None
    runs: str | None  # folder where runs are kept; None: they go
    result: str


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if job.what == "train":
        _write(job, _or_why_not(train_and_evaluate, job))
        return
    steps: dict[str, Any] = {}
    for name, lr in zip(job.models, job.lrs, strict=True):
        one = dataclasses.replace(job, models=[name], lrs=[lr])
        _write(job, {"steps": steps, "error": f"the process ended while a step of {name} was timed"})
        steps[name] = _or_why_not(time_step, one)
    _write(job, {"steps": steps})


def _or_why_not(work: Callable[[Job], dict[str, Any]], job: Job) -> dict[str, Any]:
    try:
        with room_for(lambda: OUT_OF_MEMORY):
            return work(job)
    except OutOfRoomError:
        return {"error": OUT_OF_MEMORY}
    except SerpentError as error:
        return {"error": str(error)}


def _write(job: Job, result: dict[str, Any]) -> None:
    Path(job.result).write_text(json.dumps(result, indent=1) + "\n")


def time_step(job: Job) -> dict[str, Any]:
    """Milliseconds of a step of `serpent train`, data and all."""
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(_recipe(job, Path(folder, "run"), lr=job.lrs[0], steps=1, val_every=1))
    (stage,) = planned.stages
    return {"error": OUT_OF_MEMORY} if stage.error else {"step_ms": 1e3 * stage.seconds}


def train_and_evaluate(job: Job) -> dict[str, Any]:
    """The better learning rate by short runs, the run, and its weights on all sets of images."""
    budget, (model,) = job.minutes * 60, job.models
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(job.runs, f"{job.task}.{model}") if job.runs else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        probes = []
        for lr in job.lrs if len(job.lrs) > 1 else []:
            steps = _steps(job.probe_seconds, job.step_ms)
            rows = _train(job, folder / f"probe-{lr:g}", lr=lr, steps=steps, val_every=steps, optional=True)
            probes.append({"lr": lr, **(_curve(rows, job.batch)[-1] if rows else {"psnr": None})})
        lr = max(probes, key=lambda probe: probe["psnr"] or -math.inf)["lr"] if probes else job.lrs[0]
        rows = _train(job, folder / "run", lr=lr, steps=_steps(budget, job.step_ms), val_every=job.val_every)
        curve = _curve(rows, job.batch)
        device = pick_device(job.device)
        network = create_model(f"{model}.{job.task}", checkpoint_path=folder / "run" / "weights.safetensors")
        network = network.to(device)
        lpips = Lpips(Path(job.lpips_weights), device) if job.lpips_weights else None
        evaluation = {}
        for name, images in job.val.items():
            evaluation[name] = evaluate_network(network, list_images(images), job.task, seed=job.seed, lpips=lpips)
            del evaluation[name]["images"]
        seen = len(list_images(job.curve_data))
    about = {"model": model} | {
        key: getattr(job, key) for key in ("task", "crop", "batch", "minutes", "probe_seconds", "seed")
    }
    return about | {
        "device": device_name(device),
        "torch": torch.__version__,
        "train": job.train,
        "params": sum(p.numel() for p in network.parameters()),
        "lr": lr,
        "probes": probes,
        "step_ms": job.step_ms,
        "steps": rows[-1]["step"],
        "images": curve[-1]["images"],
        "seconds": curve[-1]["seconds"],
        "curve_set": job.curve,
        "curve_images": seen,
        "curve": curve,
        "evaluation": evaluation,
    }


def _steps(seconds: float, ms: float) -> int:
    return max(1, round(1e3 * seconds / ms))


def _train(
    job: Job, out: Path, *, lr: float, steps: int, val_every: int, optional: bool = False
) -> list[dict[str, Any]]:
    """The rows of the run's log; with `optional` none for a run that failed, as at too high a learning rate."""
    shutil.rmtree(out, ignore_errors=True)  # one that was cut off
    try:
        train(_recipe(job, out, lr=lr, steps=steps, val_every=val_every))
    except SerpentError as error:
        if not optional or isinstance(error, OutOfRoomError):  # which is so at any learning rate
            raise
        return []
    return [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]


def _recipe(job: Job, out: Path, *, lr: float, steps: int, val_every: int) -> Path:
    recipe = {
        "model": job.models[0], "task": job.task, "train": job.train, "val": job.curve_data, "out": str(out), "lr": lr,
        "keep": 1, "warmup": min(200, steps // 10), "val_every": min(val_every, steps), "seed": job.seed,
        "device": job.device, "stages": [{"crop": job.crop, "batch": job.batch, "steps": steps}],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(json.dumps(recipe, indent=1))  # which is YAML
    return file


def _curve(rows: list[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """What the validations of a run say of its averaged weights."""
    return [
        {"images": batch * row["step"], "seconds": row["seconds"], "psnr": row["psnr"], "ssim": row["ssim"]}
        for row in rows
        if row.get("psnr") is not None
    ]


def write(job: Job, file: Path) -> None:
    file.write_text(json.dumps(dataclasses.asdict(job), indent=1))


if __name__ == "__main__":
    main()
