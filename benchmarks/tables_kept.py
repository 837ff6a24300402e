"""What benchmarks/tables.py finds in its --out from earlier calls, and what this call continues from."""

import json
from pathlib import Path
from typing import Any

import torch

from serpent_ir.errors import OUT_OF_MEMORY
from serpent_ir.system.devices import device_name, pick_device
from serpent_ir.system.whole_file import whole_file
from tables_job import Job

# The paper's rates (section 4.1; for Restormer those of the appendix, whose list lacks the text's 0.003) and a
# neighbour.
RATES = {"serpent": [1e-3, 5e-4], "unet": [5e-4, 1e-3], "restormer": [3e-4, 5e-4], "swinir": [1e-3, 3e-4]}


def place_of(job: Job, folder: Path) -> Path:
    return folder / f"{job.task}.{job.minutes:g}min"


def rates(name: str, lrs: list[float] | None) -> list[float]:
    return lrs or RATES.get(name.partition("_")[0], [1e-3, 3e-4])


def settings(job: Job, lrs: list[float]) -> dict[str, Any]:
    """The settings that must agree among results in one table, and with the results that a call continues from.

    They include PyTorch if steps may be timed now, since it changes how long a step takes. Steps of another device were
    timed there, with the PyTorch of that day. Which PyTorch then trains that many steps matters as little as which
    device does.
    """
    about = {key: getattr(job, key) for key in ("crop", "batch", "seed", "probe_seconds", "curve_images")}
    lpips = Path(job.lpips_weights).name if job.lpips_weights else None
    about |= {"train": told(job.train), "lrs": lrs, "lpips_weights": lpips}
    return about | {"device": job.minutes_of} | ({"torch": torch.__version__} if is_here(job) else {})


def is_here(job: Job) -> bool:
    """Whether the minutes are those of this device."""
    return job.minutes_of == device_name(pick_device(job.device))


def timed(job: Job, lrs: list[float] | None, folder: Path) -> dict[str, dict[str, Any]]:
    """By network: `probes`, `step_ms`, their settings, and `longer` if it is there; of this budget, else of another."""
    found: dict[str, dict[str, Any]] = {}
    places = sorted(folder.glob(f"{job.task}.*min"), key=lambda place: (place != place_of(job, folder), place.name))
    for file in [file for place in places for file in sorted(place.glob("*.json"))]:
        name, content = file.name.split(".")[0], read(file)
        now = settings(job, rates(name, lrs))
        del now["lpips_weights"]  # a probe does not use them
        before = content.get("settings", {})
        if all(before.get(key) == now[key] for key in now):
            parts = {key: content[key] for key in ("probes", "step_ms", "longer", "settings") if key in content}
            found[name] = parts | found.get(name, {})
    return {name: parts for name, parts in found.items() if "probes" in parts}


def undecided(made: dict[str, Any]) -> bool:
    """Whether longer runs still have to choose the learning rate, for a row or for timing runs."""
    return "longer" not in made and sum(each["psnr"] is not None for each in made.get("probes", [])) > 1


def done(file: Path) -> bool:
    return settled(file) and not undecided(read(file))


def unprobed(job: Job, networks: list[str], lrs: list[float] | None, folder: Path) -> list[str]:
    """Those of the networks that have neither a result nor anything from which they could be trained."""
    known, place = timed(job, lrs, folder), place_of(job, folder)
    ends = (".json", ".probe.json")  # if one of them failed for lack of memory, that is a result
    return [name for name in networks if name not in known and not any(settled(place / f"{name}{e}") for e in ends)]


def told(sources: list[str]) -> list[str]:
    """The names of training sets, independent of where the data lie."""
    return ["/".join(Path(source).parts[-2:]) for source in sources]


def settled(file: Path) -> bool:
    """Whether there is a result. That a network does not fit in memory is one too."""
    return file.exists() and read(file).get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def write(file: Path, text: str) -> None:
    with whole_file(file) as content:  # so that a kill leaves no half file, which the next call could not read
        content.write(text.encode())
