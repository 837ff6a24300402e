"""Training on one device: progressive crops, Adam with warm-up and cosine, averaged weights, resumable at any step."""

import copy
import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from serpent_ir.data import TrainingSet, list_images
from serpent_ir.degradations import create_degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.evaluate import evaluate_network, read_clean
from serpent_ir.inference import pick_device
from serpent_ir.models import WEIGHTS_DIR, create_model, list_models, load_weights
from serpent_ir.recipe import Recipe, Stage, load_recipe

LOG_EVERY = 50  # steps; reading the loss makes the host wait for the device
CUDA_GRAPHS = True  # a step of many small kernels is otherwise bound by the host that launches them


def train(config: Path, overrides: Sequence[str] = ()) -> Path:
    """Train a network as a recipe says, and return the file of its averaged weights.

    The run's folder holds `recipe.json`, `log.jsonl`, `weights.safetensors` (averaged, float32, loadable with
    `create_model(..., checkpoint_path=...)`) and `state.pt`. A run whose folder has a `state.pt` of the same recipe
    goes on from there, and ends where an uninterrupted one does.

    Raises:
        UsageError: a recipe that does not fit its schema, or a folder without images.
        SerpentError: a run folder of another recipe, or a loss that is not finite.
    """
    recipe = load_recipe(config, overrides)
    with own_stream(pick_device(recipe.device)):
        return Trainer(recipe).run()


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA stream to build and run a Trainer on; nothing on other devices.

    Graphs cannot be captured on the default stream, and autograd remembers the stream on which it met a parameter.
    """
    return torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _starting_network(recipe: Recipe) -> nn.Module:
    """A fresh network, or with the weights that the recipe starts from."""
    if not recipe.start:
        return create_model(recipe.model, task=recipe.task)
    path = WEIGHTS_DIR / f"{recipe.start}.safetensors" if recipe.start in list_models(pretrained=True) else recipe.start
    state, _ = load_weights(path)
    network = create_model(recipe.model, task=recipe.task)
    try:
        network.load_state_dict(state)
    except RuntimeError:
        raise UsageError(f"start: {recipe.start} holds no weights of {recipe.model}") from None
    return network


class Trainer:
    """The training of one recipe. On a CUDA device build it and call it inside `own_stream`."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = _progress):
        if recipe.model not in list_models():
            raise UsageError(f"unknown model {recipe.model!r}; valid: {', '.join(list_models())}")
        self.recipe = recipe
        self.say = say
        self.device = pick_device(recipe.device)
        self.out = Path(recipe.out)
        degradation = create_degradation(recipe.task)
        self.val_files = list_images(recipe.val)
        for file in self.val_files:  # a bad one is better found now than at the first validation
            read_clean(file, degradation)
        self.cache = TrainingSet(recipe.train, degradation, self.device)
        for stage in recipe.stages:
            self.cache.check_crop(stage.crop)
        self.stages = [replace(stage, steps=recipe.steps_of(stage, len(self.cache))) for stage in recipe.stages]
        self.steps = sum(stage.steps for stage in self.stages)
        self.step, self.seconds = 0, 0.0  # seconds of training, validation left out
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = _starting_network(recipe)
        self.network = network.to(self.device).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.update: Callable[[Tensor, Tensor], Tensor] = self._update
        lr: float | Tensor = recipe.lr
        on_gpu = self.device.type == "cuda"
        if on_gpu and CUDA_GRAPHS:
            self.update = GraphedStep(self._update)
            lr = torch.tensor(recipe.lr, device=self.device)  # a number would be frozen into the graph
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr, fused=on_gpu, capturable=on_gpu)
        self._open_run()

    def run(self) -> Path:
        """Train from the current step to the last one."""
        recipe = self.recipe
        self.say(
            f"{recipe.model} {recipe.task}: {self.steps} steps in {len(self.stages)} stage(s) on {self.device}; "
            f"{len(self.cache)} training and {len(self.val_files)} validation images"
        )
        since, since_step = time.perf_counter(), self.step
        losses: list[Tensor] = []
        while self.step < self.steps:
            number, stage, first = self._place(self.step)
            losses.append(self._train_step(stage, first))
            self.step += 1
            stage_ends = self.step == self.steps or self._place(self.step)[0] != number
            keep = stage_ends or self.step % recipe.val_every == 0
            if keep or self.step % LOG_EVERY == 0:
                loss = torch.stack(losses).mean().item()
                if not math.isfinite(loss):
                    raise SerpentError(f"{self.out}: the loss is {loss} at step {self.step}; lower lr and train again")
                spent = time.perf_counter() - since
                self.seconds += spent
                ms = 1000 * spent / (self.step - since_step)
                row = {"stage": number + 1, "crop": stage.crop, "loss": loss, "lr": self._lr(), "ms": ms}
                self._log(f"of {self.steps}, {self._minutes_left(ms):.1f} min left", **row)
                since, since_step, losses = time.perf_counter(), self.step, []
            if keep:
                self._validate()
                self.save()
                since = time.perf_counter()
        self.say(f"the averaged weights are in {self.out / 'weights.safetensors'}")
        return self.out / "weights.safetensors"

    def save(self) -> None:
        """Write the averaged weights and everything needed to go on, each file whole or not at all."""
        metadata = {"network": self.recipe.model, "task": self.recipe.task, "step": str(self.step)}
        weights = {name: tensor.contiguous() for name, tensor in self.average.state_dict().items()}
        # As bytes, since safetensors would make a file that its owner alone can read.
        _replace(self.out / "weights.safetensors", lambda path: path.write_bytes(save(weights, metadata)))
        state = {name: part.state_dict() for name, part in self._parts().items()}
        _replace(
            self.out / "state.pt", lambda path: torch.save({"step": self.step, "seconds": self.seconds, **state}, path)
        )

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer}

    def _open_run(self) -> None:
        """Make the run's folder, or go on from its last checkpoint."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SerpentError(f"{self.out}: cannot be made a folder ({error.strerror}); choose another out=") from None
        told = json.dumps(dataclasses.asdict(self.recipe), indent=2) + "\n"
        recipe_file, state_file = self.out / "recipe.json", self.out / "state.pt"
        log_file = self.out / "log.jsonl"
        if not state_file.exists():
            recipe_file.write_text(told)
            log_file.write_text("")
            return
        if not recipe_file.exists() or recipe_file.read_text() != told:
            raise SerpentError(f"{self.out}: holds a run of another recipe; choose another out= or remove the folder")
        try:
            state = torch.load(state_file, map_location=self.device, weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except Exception as error:  # pickle, zip and torch each have their own types for a damaged file
            raise SerpentError(f"{state_file}: is damaged ({type(error).__name__}); remove it to start anew") from error
        self.step, self.seconds = state["step"], state["seconds"]
        rows = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
        log_file.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.step))
        self.say(f"going on from step {self.step} of {state_file}")

    def _place(self, step: int) -> tuple[int, Stage, int]:
        """Number and stage of a step, and how many samples were drawn before it."""
        samples = 0
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage, samples + step * stage.batch
            step -= stage.steps
            samples += stage.steps * stage.batch
        raise IndexError(step)

    def _lr(self) -> float:
        """Learning rate of the current step: linear warm-up, then a cosine to zero."""
        warm = min(1.0, (self.step + 1) / max(1, self.recipe.warmup))
        return self.recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _train_step(self, stage: Stage, first: int) -> Tensor:
        degraded, clean = self.cache.batch(range(first, first + stage.batch), stage.crop, seed=self.recipe.seed)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._lr())
            else:
                group["lr"] = self._lr()
        loss = self.update(degraded, clean)
        # The average follows quickly at first, so that it never drags the initial weights along.
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        pairs = tuple(self.average.parameters()), tuple(self.network.parameters())
        torch._foreach_lerp_(*pairs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        return loss

    def _update(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """Forward, backward and the optimiser's step; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            restored = self.network(degraded)
        loss = F.l1_loss(restored.float(), clean)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.detach()

    def _validate(self) -> None:
        result = evaluate_network(self.average, self.val_files, self.recipe.task)
        self._log("validation", **{k: result[k] for k in ("psnr", "ssim", "input_psnr", "input_ssim")})

    def _minutes_left(self, ms: float) -> float:
        """Estimate for the rest of the run from the milliseconds of a step now: a step costs as its pixels do."""
        number, stage, _ = self._place(self.step - 1)
        ahead = [replace(stage, steps=sum(s.steps for s in self.stages[: number + 1]) - self.step)]
        pixels = sum(s.steps * s.batch * s.crop**2 for s in [*ahead, *self.stages[number + 1 :]])
        return pixels * ms / (stage.batch * stage.crop**2) / 60_000

    def _log(self, note: str, **row: Any) -> None:
        """Append a row to the log, and say it with a note."""
        row = {"step": self.step, **row, "seconds": round(self.seconds, 1)}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        texts = [f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        self.say("  ".join([f"{texts[0]} ({note})", *texts[1:]]))


class GraphedStep:
    """Calls `step(*tensors) -> tensor` from a CUDA graph, captured anew whenever the shapes change.

    The first calls at a shape run as they are: they make the kernels and the optimiser's state that the graph goes on
    with. All calls must come on one stream that is not the default one.
    """

    WARMUP = 3

    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = [x.shape for x in tensors]
        if shapes != self.shapes:
            torch.cuda.synchronize()  # before the memory of the old graph goes
            self.shapes, self.calls, self.graph, self.inputs, self.output = shapes, 0, None, [], None
        self.calls += 1
        if self.calls <= self.WARMUP:
            return self.step(*tensors)
        if self.graph is None:
            self.inputs = [x.clone() for x in tensors]
            self.graph = torch.cuda.CUDAGraph()
            gc.collect()  # a forgotten autograd graph would still hold nodes of its own
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.output = self.step(*self.inputs)
        for kept, x in zip(self.inputs, tensors, strict=True):
            kept.copy_(x)
        self.graph.replay()
        assert self.output is not None
        return self.output.clone()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it, so that `path` is always whole."""
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
        reason = str(error).splitlines()[0]
        raise SerpentError(f"{path}: cannot be written ({reason}); make room and start again to go on") from error
    finally:
        temporary.unlink(missing_ok=True)
