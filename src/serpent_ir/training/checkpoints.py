"""Writes and reads checkpoints. Each is a folder of hashed safetensors files, which is there whole or not at all.

    checkpoints/step-00004000/
        average.0.safetensors     groups of tensors, in the order they were given in, in parts of at most 15 MiB
        network.0.safetensors
        ...
        manifest.json             step and other facts, size and SHA-256 of every file, and a SHA-256 of itself
        score.json                of the validation, if there was one, and a SHA-256 of itself

A folder is written under another name, with the manifest last, synced to disk and then renamed. Nothing in it is ever
executed: it holds tensors and JSON only.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from serpent_ir.errors import SerpentError
from serpent_ir.system.whole_file import replace_file
from serpent_ir.training.recipe import Recipe

PART_BYTES = 15 << 20
"""Most bytes of tensors per file, so that files fit under a limit of 16 MiB. A larger tensor gets its own file."""

FREE_TO_CHANGE = {"train", "val", "out", "device", "accumulate", "recompute", "keep", "val_every"}
"""Keys of a recipe that say where and how it runs. A run may continue with other values; the rest decide the result."""

ASIDE = ".aside"
"""Suffix of a checkpoint's name while another one of the same step takes its place."""

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole. Its tensors are on the CPU."""

    path: Path
    step: int
    facts: dict[str, Any]
    groups: Groups
    score: dict[str, Any] | None

    def changes(self, recipe: Recipe, images: dict[str, Any]) -> list[str]:
        """The keys in which a recipe that is to go on from here differs from the run's.

        Raises:
            SerpentError: for a recipe or training images (`images` identifies them) that are those of another run.
        """
        differ = recipe.differs_from(self.facts["recipe"])
        out = Path(recipe.out)
        if others := [key for key in differ if key not in FREE_TO_CHANGE]:
            raise SerpentError(
                f"{out}: holds a run of another recipe ({', '.join(others)}); choose another out=, where "
                f"start={out / 'weights.safetensors'} goes on from its weights"
            )
        if (then := self.facts["images"]) != images:
            raise SerpentError(
                f"{out}: was trained on {then['count']} images, and the {images['count']} of train now are others; "
                "choose another out="
            )
        return differ


class Checkpoints:
    """The checkpoints of a run, in a folder that is made when the first one is written.

    `of` says what scores refer to (the validation images). Scores that refer to something else are not compared.
    """

    def __init__(self, folder: Path, keep: int, of: dict[str, Any] | None = None):
        self.folder = folder
        self.keep = keep
        self.of = of or {}

    def paths(self) -> list[Path]:
        """All checkpoints that are there, whole or damaged, in the order of their steps."""
        return sorted(self.folder.glob("step-*[0-9]"))

    def save(self, step: int, groups: Groups, facts: dict[str, Any]) -> Path:
        """Write a checkpoint and remove those that need not be kept.

        Raises SerpentError if it cannot be written; existing ones stay.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = path.with_name(path.name + ".part")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            files = {}
            for name, tensors in _parts(groups):
                content = save(tensors)
                _write(temporary / name, content)
                files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            body = {"format": 1, "step": step, **facts, "files": files}
            _write(temporary / "manifest.json", json.dumps({**body, "sha256": _seal(body)}, indent=1).encode())
            _sync_folder(temporary)
            aside = path.with_name(path.name + ASIDE)
            if path.exists():  # the same step again; if this is killed before the new one is there, `clean` restores it
                path.rename(aside)
            temporary.rename(path)
            _sync_folder(self.folder)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            self.clean()
            last = self.paths()
            there = f"{last[-1].name} is untouched; " if last else ""
            reason = error.strerror or str(error)
            raise SerpentError(
                f"{path}: cannot be written ({reason}); {there}make room and go on with --resume"
            ) from None
        self._prune()
        return path

    def score(self, path: Path, score: dict[str, Any]) -> None:
        """Record the validation of a checkpoint. The one with the best PSNR is kept besides the last ones."""
        body = score | self.of
        replace_file(path / "score.json", json.dumps({**body, "sha256": _seal(body)}).encode())
        self._prune()

    def best(self) -> Path | None:
        """The checkpoint with the highest validation PSNR; the latest one of equals."""
        scores = [(_score(path), path) for path in self.paths()]
        scored = [(score["psnr"], path) for score, path in scores if score is not None and self.comparable(score)]
        return max(scored)[1] if scored else None

    def best_weights(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and averaged weights of the best checkpoint; None if there is none that is whole."""
        best = self.best()
        try:
            found = _read(best) if best else None
        except _DamageError:
            return None
        return (found.step, found.groups["average"]) if found else None

    def comparable(self, score: dict[str, Any]) -> bool:
        """Whether a score refers to the same images as this run's scores."""
        return all(score.get(key) == value for key, value in self.of.items())

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none at all.

        A damaged one is reported and skipped. It stays, renamed to `step-NUMBER.damaged`. If all are damaged, raises
        SerpentError and leaves them. A damaged score is reported too, and is ignored.
        """
        for path in self.paths():
            if (score := path / "score.json").exists() and _score(path) is None:
                say(f"{score}: is damaged or of a run before 0.1; this validation does not count")
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            try:
                found = _read(path)
            except _DamageError as problem:
                damaged.append((path, str(problem)))
                continue
            for bad, problem in damaged:
                say(f"{bad}: {problem}; going on from {path.name}, the one before")
                shutil.rmtree(bad.with_suffix(".damaged"), ignore_errors=True)
                bad.rename(bad.with_suffix(".damaged"))
            return found
        if damaged:
            path, problem = damaged[0]
            raise SerpentError(f"{path}: {problem}, and no other is whole; remove {self.folder} to start anew")
        return None

    def clean(self) -> None:
        """Repair what an interrupted write or removal left behind."""
        for aside in self.folder.glob(f"step-*{ASIDE}"):
            path = aside.with_name(aside.name.removesuffix(ASIDE))
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(path)
        for path in self.folder.glob("step-*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        paths = self.paths()
        kept = {*paths[-self.keep :], self.best()}
        for path in paths:
            if path not in kept:
                _remove(path)


class _DamageError(Exception):
    pass


def _parts(groups: Groups) -> list[tuple[str, dict[str, Tensor]]]:
    """File names and their tensors."""
    parts: list[tuple[str, dict[str, Tensor]]] = []
    for group, tensors in groups.items():
        number, size, part = 0, 0, {}
        for name, tensor in tensors.items():
            if part and size + tensor.nbytes > PART_BYTES:
                parts.append((f"{group}.{number}.safetensors", part))
                number, size, part = number + 1, 0, {}
            # Copied, because safetensors refuses tensors that share memory.
            part[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += tensor.nbytes
        parts.append((f"{group}.{number}.safetensors", part))
    return parts


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it."""
    try:
        body = json.loads((path / "manifest.json").read_bytes())
        if body.pop("sha256") != _seal(body):
            raise ValueError
    except OSError as error:
        raise _DamageError(f"manifest.json cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _DamageError("manifest.json is damaged") from None
    groups: Groups = {}
    body.pop("format")
    for name, expected in body.pop("files").items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _DamageError(f"{name} cannot be read ({error.strerror})") from None
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise _DamageError(f"{name} is damaged (its hash differs)")
        groups.setdefault(name.split(".")[0], {}).update(load(content))
    return Checkpoint(path, body.pop("step"), body, groups, _score(path))


def _score(path: Path) -> dict[str, Any] | None:
    """What a validation found; None if there was none, or if the file is not as it was written."""
    try:
        score = json.loads((path / "score.json").read_bytes())
        whole = score.pop("sha256") == _seal(score) and math.isfinite(score["psnr"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return score if whole else None


def _remove(path: Path) -> None:
    """Remove a checkpoint.

    It is renamed first, so that what a kill leaves half removed never passes for a checkpoint.
    """
    gone = path.with_name(path.name + ".old.part")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk, if the system can do that."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, named `NUMBER.NAME`."""
    return {f"{i}.{name}": x for i, state in optimizer.state_dict()["state"].items() for name, x in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors`. What the recipe sets (learning rate and so on) stays as it is."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
