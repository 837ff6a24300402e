"""Checkpoints: a folder for each, of hashed safetensors files, there as a whole or not at all.

    checkpoints/step-00004000/
        average.0.safetensors     groups of tensors, in the order they were given in, in parts of at most 15 MiB
        network.0.safetensors
        ...
        manifest.json             step and other facts, size and SHA-256 of every file, and a SHA-256 of itself
        score.json                of the validation, where there was one, and a SHA-256 of itself

A folder is written under another name, the manifest last, brought to the disk and then renamed. Nothing in it is ever
executed: tensors and JSON alone.
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

PART_BYTES = 15 << 20
"""Most bytes of tensors in a file; one tensor that is larger has a file of its own. Fits where 16 MiB is the limit."""

ASIDE = ".aside"
"""Ends the name of a checkpoint while another of its step takes its place."""

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole; tensors are on the CPU."""

    path: Path
    step: int
    facts: dict[str, Any]
    groups: Groups
    score: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of a run, in a folder that is made when the first is written.

    `of` says what scores are of (the validation images); those of something else are not compared with them.
    """

    def __init__(self, folder: Path, keep: int, of: dict[str, Any] | None = None):
        self.folder = folder
        self.keep = keep
        self.of = of or {}

    def paths(self) -> list[Path]:
        """All that are there, whole or damaged, in the order of their steps."""
        return sorted(self.folder.glob("step-*[0-9]"))

    def save(self, step: int, groups: Groups, facts: dict[str, Any]) -> Path:
        """Write a checkpoint and remove those that the policy does not keep.

        Raises SerpentError where it cannot be written; those that were there stay.
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
            if path.exists():  # the same step again; `clean` puts it back if a kill comes before the new one is there
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
        """Note the validation of a checkpoint; the best PSNR is kept beside the last ones."""
        body = score | self.of
        replace_file(path / "score.json", json.dumps({**body, "sha256": _seal(body)}).encode())
        self._prune()

    def best(self) -> Path | None:
        """The one of the highest validation PSNR, the latest of equals."""
        scores = [(_score(path), path) for path in self.paths()]
        scored = [(score["psnr"], path) for score, path in scores if score is not None and self.comparable(score)]
        return max(scored)[1] if scored else None

    def best_weights(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and averaged weights of the best, None where there is none that is whole."""
        best = self.best()
        try:
            found = _read(best) if best else None
        except _DamageError:
            return None
        return (found.step, found.groups["average"]) if found else None

    def comparable(self, score: dict[str, Any]) -> bool:
        """Whether a score is of the same images as those that this run makes."""
        return all(score.get(key) == value for key, value in self.of.items())

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest that is whole, None where there is none at all.

        A damaged one is said and passed over; it stays, by the name of `step-NUMBER.damaged`. Raises SerpentError where
        all are damaged, and leaves them. A score that is damaged is said, too, and counts as none.
        """
        for path in self.paths():
            if (score := path / "score.json").exists() and _score(path) is None:
                say(f"{score}: is damaged; this validation does not count")
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
        """Put right what an interrupted write or removal left behind."""
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
            # A copy, because safetensors refuses tensors that share memory.
            part[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += tensor.nbytes
        parts.append((f"{group}.{number}.safetensors", part))
    return parts


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Checkpoint:
    """A checkpoint, every byte of it checked."""
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
    """What a validation found; None where there was none, or where it is not as it was written. Older runs did not seal
    it."""
    try:
        score = json.loads((path / "score.json").read_bytes())
        whole = score.pop("sha256", None) in (None, _seal(score)) and math.isfinite(score["psnr"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return score if whole else None


def _remove(path: Path) -> None:
    """By another name first, so that what a kill leaves half removed is never taken for a checkpoint."""
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
    """Bring the names in a folder to the disk, where the system knows how to."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as flat tensors, `NUMBER.NAME`."""
    return {f"{i}.{name}": x for i, state in optimizer.state_dict()["state"].items() for name, x in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors`; what the recipe says (learning rate and so on) stays as it is."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
