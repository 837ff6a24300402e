"""What faults happen to: small images, weights, a packed set and a run, commands, and what they make undisturbed."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from faults.calls import Child, Ended, serpent
from serpent_ir import create_model
from serpent_ir.models.seals import sealed

WEIGHTS = ("--weights", "w.safetensors")
COMMANDS = {
    "restore": ("restore", "photos", "-o", "out", *WEIGHTS, "--manifest", "done.jsonl"),
    "compare": ("restore", "photos", "-o", "out", *WEIGHTS, "--skip-existing", "--compare"),
    "degrade": ("degrade", "photos", "-o", "out", "--task", "deblur"),
    "pack": ("data", "pack", "photos", "-o", "out/p.serpent"),
    "evaluate": ("evaluate", "--data", "photos", "--task", "deblur", *WEIGHTS, "--json"),
    "train": ("train", "recipe.yaml"),
}
OPTIONS = {"dim": 8, "blocks": [1, 1]}


def photo(rng: np.random.Generator, height: int = 40, width: int = 48, dtype: type = np.uint8) -> np.ndarray:
    """Waves and a little noise, (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / 8
    waves = np.stack([np.sin(x + k) * np.cos(y * (k + 1) / 2) for k in rng.uniform(0, 3, 3)], -1)
    most = np.iinfo(dtype).max
    return ((0.5 + 0.4 * waves + rng.normal(0, 0.02, waves.shape)).clip(0, 1) * most).astype(dtype)


@dataclass
class Scene:
    """A folder `given` with the inputs, and the results of each command on them, by name."""

    folder: Path
    results: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, rng = self.folder / "given", np.random.default_rng(0)
        (given / "photos" / "more").mkdir(parents=True)
        for index, suffix in enumerate(("png", "jpg", "webp", "bmp")):
            Image.fromarray(photo(rng)).save(given / "photos" / f"{index}.{suffix}")
        tifffile.imwrite(given / "photos" / "more" / "4.tif", photo(rng, dtype=np.uint16), photometric="rgb")
        torch.manual_seed(0)
        state = create_model("serpent_b", dim=8, blocks=(1, 1)).state_dict()
        about = {"network": "serpent_b", "task": "deblur", "options": json.dumps(OPTIONS)}
        (given / "w.safetensors").write_bytes(sealed(save(state, about)))
        stages = [{"crop": 8, "batch": 2, "steps": 6}]
        recipe = {"model": "serpent_b", "task": "deblur", "train": ["photos"], "val": "photos", "out": "run"}
        recipe |= {"stages": stages, "warmup": 2, "val_every": 2, "keep": 3, "device": "cpu", "model_options": OPTIONS}
        (given / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for command in COMMANDS:
            place = self.place(f"true-{command}")
            ended = self.call(command, place)
            if ended.status:
                raise SystemExit(f"{command}, undisturbed: {ended.said}")
            self.results[command] = found(command, place, ended)
            self.seconds[command] = ended.seconds

    def place(self, name: str) -> Path:
        """A new folder with the inputs."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / "given", place)
        return place

    def start(self, command: str, place: Path, *more: str, limits: dict[int, int] | None = None) -> Child:
        return Child(serpent(*COMMANDS[command], *more), place, limits)

    def call(self, command: str, place: Path, *more: str, **bounds: int) -> Ended:
        return self.start(command, place, *more).end(**bounds)

    def again(self, command: str, place: Path) -> str:
        """Call it undisturbed where it was disturbed; what is wrong then, "" for nothing."""
        ended = self.call(command, place, *(["--resume"] if command == "train" else []))
        if problem := words(ended):
            return f"again: {problem}"
        if ended.status:
            return f"again: status {ended.status}, {ended.last}"
        return differing(self.results[command], found(command, place, ended))


def found(command: str, place: Path, ended: Ended | None = None) -> dict[str, str]:
    """What a command made: names and hashes; of an evaluation its figures."""
    if command == "evaluate":
        told = re.search(r"^\{.*\}$", ended.said if ended else "", re.MULTILINE)
        return {"figures": told[0]} if told else {}
    if command == "train":
        left = [p.name for p in (place / "run").rglob("*") if p.suffix in (".part", ".tmp")]
        weights = place / "run" / "weights.safetensors"
        return dict.fromkeys(left, "left behind") | ({"weights": _hash(weights)} if weights.exists() else {})
    out = place / "out"
    return {str(p.relative_to(out)): _hash(p) for p in sorted(out.rglob("*")) if p.is_file()} if out.exists() else {}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing(expected: dict[str, str], got: dict[str, str]) -> str:
    """In what results differ, "" where they do not."""
    names = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
    kinds = [
        f"{name} {'is missing' if name not in got else 'differs' if name in expected else 'is there'}" for name in names
    ]
    return ", ".join(kinds)


def words(ended: Ended) -> str:
    """What is wrong with the end of a call whatever was done to it, "" for nothing."""
    if ended.hung:
        return "hangs"
    if "Traceback" in ended.said or ended.status == 70:
        return f"a traceback: {ended.last}"
    if ended.status in (-4, -6, -7, -8, -11):
        return f"crashes by signal {-ended.status}: {ended.last}"
    return ""


def refused(ended: Ended) -> str:
    """The same of one that may fail, in a line for people."""
    if problem := words(ended):
        return problem
    if ended.status and not ended.last.startswith("serpent: error: "):
        return f"status {ended.status} without a line: {ended.last!r}"
    return ""
