"""The training loop: batches, steps, averaged weights, validation and checkpoints. It can be resumed at any step."""

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from serpent_ir.data import Prefetcher, TrainingSet, list_images
from serpent_ir.degradations import create_degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models.seals import sealed
from serpent_ir.system.devices import pick_precision
from serpent_ir.system.whole_file import replace_file
from serpent_ir.training import log, room, stopping
from serpent_ir.training.checkpoints import Checkpoint, Checkpoints, load_optimizer, optimizer_tensors
from serpent_ir.training.lock import own_folder
from serpent_ir.training.log import RunLog
from serpent_ir.training.losses import create_loss
from serpent_ir.training.networks import starting_network
from serpent_ir.training.recipe import Recipe, RecipeError, of_key
from serpent_ir.training.recompute import recompute_blocks
from serpent_ir.training.schedule import Schedule
from serpent_ir.training.step import GraphedStep, Step
from serpent_ir.training.stopping import OUT_OF_TIME, SAVE, Stop, StoppedError
from serpent_ir.training.validation import ValidationImages, validate
from serpent_ir.training.workers import Workers

QUEUED = 2  # steps that a GPU may be behind when the host asks for the next batch
LOG_EVERY = 50  # steps; reading the loss makes the host wait for the device
CUDA_GRAPHS = True  # without graphs a step of many small kernels is bound by the host that launches them
MOST_SKIPPED = 5  # training stops after this many steps in a row whose loss is not finite


class Trainer:
    """The training of one recipe. On a CUDA device build it and call it inside `own_stream`.

    Args:
        recipe: what to train.
        say: prints a line for people; by default on stderr, with a bar if that is a terminal.
        workers: the processes that train; by default those that the environment names.
        tensorboard: whether to write event files too.
    """

    def __init__(
        self,
        recipe: Recipe,
        say: log.Say = log.say,
        *,
        workers: Workers | None = None,
        tensorboard: bool = False,
    ):
        self.recipe = recipe
        self.workers = workers or Workers(recipe.device)
        self.device = self.workers.device
        self.say = say if self.workers.first else lambda line: None
        self.with_bar, self.tensorboard = self.workers.first and say is log.say, tensorboard
        parts = self.workers.world * recipe.accumulate
        for number, stage in enumerate(recipe.stages):
            if stage.batch % parts:
                raise RecipeError(
                    f"stages.{number}.batch is {stage.batch}; it must be a multiple of {parts}: "
                    f"{self.workers.world} process(es) x accumulate={recipe.accumulate}"
                )
        self.out = Path(recipe.out)
        self.degradation = create_degradation(recipe.task)
        with of_key("val"):
            val_files = list_images(recipe.val)
        of = {"val": recipe.val, "val_images": len(val_files)}
        self.checkpoints = Checkpoints(self.out / "checkpoints", recipe.keep, of)
        if tensorboard and self.workers.first:
            log.event_writer()
        # If there are checkpoints, their weights count, and the weights to start from may be gone.
        begun = self.workers.from_first(bool(self.checkpoints.paths()))
        network = starting_network(recipe, fresh=begun)
        self.val = ValidationImages(val_files, self.degradation, self.workers)
        mix = [create_degradation(task) for task in recipe.mix or [recipe.task]]
        with of_key("train"):
            self.data = TrainingSet(recipe.train, mix, self.device, vivid=recipe.vivid)
        self.network = network.to(self.device).train()
        self.workers.take_from_first(self.network)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        most, image = self.data.largest_crop()
        for i, crop in enumerate(stage.crop for stage in recipe.stages):
            if crop > most:
                raise RecipeError(f"stages.{i}.crop is {crop}; it must be at most {most} for {image}; or remove it")
        self.schedule = Schedule(recipe, tuple(recipe.steps_of(stage, len(self.data)) for stage in recipe.stages))
        self.step, self.seconds = 0, 0.0  # seconds of training, without validation
        self.score: dict[str, float] = {}  # of the last validation
        self.saved: tuple[int, Path] | None = None  # step and path of the checkpoint last written or resumed from
        self.validated = -1  # step of the last validation
        if recipe.recompute:
            recompute_blocks(self.network)
        self.optimizer = self._create_optimizer()
        self.update = Step(
            self.network,
            self.average,
            self.optimizer,
            create_loss(recipe.loss, recipe.frequency),
            self.device,
            clip=recipe.clip,
            dtype=pick_precision(recipe.precision, self.device),
            parts=recipe.accumulate,
        )
        self.graphs: list[GraphedStep] = []
        if self.workers.joined:
            # One sum of all gradients between two graphs. DistributedDataParallel has many sums within the backward
            # pass, and nothing watches NCCL inside a graph, which all processes would have to replay or none.
            gradients, go = self._graphed(self.update.gradients), self._graphed(self.update.go)
            self.call = lambda *batch: go(self.workers.mean_(gradients(*batch)))
        else:
            self.call = self._graphed(self.update)

    def _graphed(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls this part of a step, from a CUDA graph if that is possible."""
        if not CUDA_GRAPHS or self.device.type != "cuda":
            return part
        self.graphs.append(GraphedStep(part, self.workers))
        return self.graphs[-1]

    def _create_optimizer(self) -> torch.optim.Optimizer:
        on_gpu = self.device.type == "cuda"
        # On a GPU it is a tensor, since a number would be frozen into the graph.
        lr = torch.tensor(self.recipe.lr, device=self.device) if on_gpu else self.recipe.lr
        fused = self.device.type in ("cuda", "cpu")
        return torch.optim.Adam(self.network.parameters(), lr=lr, fused=fused, capturable=on_gpu)

    def run(self, *, resume: bool = False, stop_after_minutes: float | None = None) -> Path:
        """Train from the current step to the last one, or for the given time. Returns the path of the averaged weights.

        Raises:
            UsageError: the folder holds a run, and `resume` is not set.
            StoppedError: a signal asked for it; the run was saved.
            OutOfRoomError: a step or a validation does not fit in memory.
            SerpentError: the folder holds a run of another recipe, or another training works there; losses are not
                finite; the disk is full.
        """
        stop = Stop(stop_after_minutes)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), own_folder(self.out) if self.workers.first else nullcontext():
            torch.manual_seed(self.recipe.seed)
            again = self._open(resume)
            recipe = self.recipe
            self.say(
                f"{recipe.model} {recipe.task}: {self.schedule.steps} steps in {len(recipe.stages)} stage(s) on "
                f"{self.workers.told()}; {len(self.data)} training and {len(self.val)} validation images"
            )
            if 2 * (crop := recipe.stages[-1].crop) < (side := self.data.largest_crop()[0]):
                told = f"crops of {crop} px are cut from images of {side} px and more, which are not reduced"
                self.say(f"{told}; to reduce them: serpent data pack --size")
            try:
                with stop.listening(), self.log.showing(self.schedule.steps, self.with_bar):
                    if again is not None:
                        self._validate(again)
                    self._loop(stop)
                if self.step == self.schedule.steps and self.workers.first:
                    self._finish()
                self.workers.leave()
            except StoppedError:
                self.workers.leave()
                raise
            finally:
                self.log.close()
        return self.out / "weights.safetensors"

    def _loop(self, stop: Stop) -> None:
        batches = self.batches()
        since, first_step = time.perf_counter(), self.step
        waited = batches.waited
        while self.step < self.schedule.steps:
            self.workers.catch_up(QUEUED)
            asked = self.workers.most(stop.asked())
            ends, due = asked > SAVE, False
            if not ends:
                with room.room_for(lambda: room.training(self.recipe, self.workers, self.schedule.place(self.step)[0])):
                    self.train_step(*next(batches))
                self.step += 1
                self.log.at(self.step)
                due = self.schedule.validates(self.step)
            if ends or asked or due or self.step % LOG_EVERY == 0:
                self.workers.catch_up()
            if self.step > first_step and (asked or due or self.step % LOG_EVERY == 0):
                spent = time.perf_counter() - since
                self.seconds += spent
                self._log(spent / (self.step - first_step), (batches.waited - waited) / spent)
                since, first_step, waited = time.perf_counter(), self.step, batches.waited
            self._check_finite()
            if asked or due:
                begun = time.perf_counter()
                path = self.save()
                if (due or asked == OUT_OF_TIME) and self.validated != self.step:
                    self._validate(path)
                stop.saved = time.monotonic()
                since += time.perf_counter() - begun
            if ends:
                self.workers.from_first(None)  # the others wait until the checkpoint is written
                line = f"{stopping.told(asked)} at step {self.step} of {self.schedule.steps}; {self.out} is saved"
                if asked != OUT_OF_TIME:
                    told = f"{line}; go on with --resume" if self.workers.first else ""
                    raise StoppedError(told, stopping.status(asked))
                self.say(f"{line}; go on with --resume")
                return

    def batches(self) -> Prefetcher:
        """This process's shares of the batches (degraded, clean), from the current step on."""
        steps = range(self.step, self.schedule.steps)
        requests = (
            (self.workers.share(self.schedule.samples(step)), self.schedule.place(step)[1].crop) for step in steps
        )
        return Prefetcher(self.data, requests, seed=self.recipe.seed)

    def train_step(self, degraded: Tensor, clean: Tensor) -> None:
        """Do the current step with its batch. The loss goes to `update.tally`."""
        lr = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.update.follow.fill_(1 - self.schedule.decay(self.step))
        self.call(degraded, clean)
        self.workers.queued()

    def save(self) -> Path | None:
        """Write a checkpoint, unless this step has one, and the averaged weights. Only the first process writes."""
        if not self.workers.first:
            return None
        if self.saved is None or self.saved[0] != self.step:
            self.saved = self.step, self._write_checkpoint()
        self._write_weights("weights", self.step, self.average.state_dict())
        return self.saved[1]

    def _write_checkpoint(self) -> Path:
        groups = {
            "average": self.average.state_dict(),
            "network": self.network.state_dict(),
            "adam": optimizer_tensors(self.optimizer),
            "generators": self._generators(),
        }
        facts = {
            "steps": self.schedule.lengths,
            "seconds": self.seconds,
            "samples": self.schedule.samples(self.step).start if self.step < self.schedule.steps else None,
            "images": self._images(),
            "workers": self.workers.told(),
            "recipe": dataclasses.asdict(self.recipe),
        }
        return self.checkpoints.save(self.step, groups, facts)

    def _images(self) -> dict[str, Any]:
        """What identifies the training set, wherever it lies and whether or not it is packed."""
        return {"count": len(self.data), "sizes": hashlib.sha256(self.data.sizes.tobytes()).hexdigest()}

    def _write_weights(self, name: str, step: int, tensors: dict[str, Tensor]) -> Path:
        metadata = {"network": self.recipe.model, "task": self.recipe.task, "step": str(step)}
        metadata["steps"] = json.dumps(self.schedule.lengths)
        if self.recipe.model_options:  # not all of them can be inferred from shapes
            metadata["options"] = json.dumps(self.recipe.model_options)
        weights = {key: tensor.contiguous() for key, tensor in tensors.items()}
        path = self.out / f"{name}.safetensors"
        # Written as bytes, since safetensors would create a file that only its owner can read.
        replace_file(path, sealed(save(weights, metadata)))
        return path

    def _generators(self) -> dict[str, Tensor]:
        """The states of PyTorch's generators. Samples need none, since they are functions of their numbers."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def _open(self, resume: bool) -> Path | None:
        """Begin in the run's folder, or continue from its newest whole checkpoint.

        Returns that checkpoint if its validation has to be repeated.
        """
        first = self.workers.first
        if first:
            self.checkpoints.clean()
            self._check_folder(resume)
        found = self.workers.from_first(self.checkpoints.newest(self.say) if first and resume else None)
        if found is not None:
            self._go_on(found)
        elif resume:
            self.say(f"{self.out}: holds no checkpoint to go on from; starting anew")
        # If so, the run was killed before the validation was complete.
        again = found is not None and self.validated != self.step and self.schedule.validates(self.step)
        since = 0 if found is None else self.step + (not again)
        self.log = RunLog(self.out, self.say, first=first, tensorboard=self.tensorboard, since=since)
        if first:
            recipe = json.dumps(dataclasses.asdict(self.recipe), indent=2, ensure_ascii=False) + "\n"
            replace_file(self.out / "recipe.json", recipe.encode())
        self.log.cut(self.step, validated=not again)
        return found.path if found is not None and again else None

    def _check_folder(self, resume: bool) -> None:
        """Refuse to overwrite a run."""
        checkpoints, weights = self.checkpoints.paths(), self.out / "weights.safetensors"
        if resume and weights.exists() and not checkpoints:
            raise UsageError(f"{self.out}: holds weights, and no checkpoint to go on from; choose another out=")
        if not resume and (checkpoints or weights.exists() or log.read_rows(self.out / "log.jsonl")):
            raise UsageError(f"{self.out}: holds a run; go on with --resume, or choose another out=")

    def _go_on(self, found: Checkpoint) -> None:
        differ = found.changes(self.recipe, self._images())
        try:
            self.network.load_state_dict(found.groups["network"])
            self.average.load_state_dict(found.groups["average"])
            load_optimizer(self.optimizer, found.groups["adam"])
        except (RuntimeError, ValueError, KeyError):
            raise SerpentError(
                f"{found.path}: is of another version of {self.recipe.model}; choose another out="
            ) from None
        self.step, self.seconds = found.step, found.facts["seconds"]
        self.saved = found.step, found.path
        if found.score is not None and self.checkpoints.comparable(found.score):
            self.score, self.validated = found.score, found.step
        torch.set_rng_state(found.groups["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in found.groups["generators"]:
            torch.cuda.set_rng_state(found.groups["generators"]["cuda"], self.device)
        line = f"going on from step {self.step} of {found.path}"
        if found.facts["workers"] != self.workers.told():
            line += f", made on {found.facts['workers']}: here the same up to rounding"
        if "train" in differ:
            line += "; train moved: the same images are expected there"
        self.say(line)

    def _check_finite(self) -> None:
        """Stop if several steps in a row were skipped. A GPU is only asked when the loss is read anyway."""
        if self.device.type == "cuda" and self.step % LOG_EVERY and not self.schedule.validates(self.step):
            return
        if self.update.tally.in_a_row() < MOST_SKIPPED:
            return
        path = self.workers.from_first(self.save())
        raise SerpentError(
            f"{self.out}: loss or gradient were not finite in {MOST_SKIPPED} steps in a row, by step {self.step}; the "
            f"weights from before are in {path}; lower lr and train again, or --resume to try other samples"
        )

    def _log(self, seconds: float, share: float) -> None:
        """Log the steps since the last log: `seconds` per step, of which `share` was spent waiting for data."""
        number, stage, _ = self.schedule.place(self.step - 1)
        loss, skipped = self.update.tally.take()
        rate = stage.batch / seconds
        row = {
            "stage": number + 1,
            "crop": stage.crop,
            "loss": loss,
            "lr": self.schedule.lr(self.step - 1),
            "ms": 1000 * seconds,
            "images_per_second": rate,
            "waited_for_data": share,
            "skipped": skipped,
            "seconds": round(self.seconds, 1),
        }
        left = f"{log.duration(self.schedule.seconds_left(self.step, seconds))} left"
        texts = [f"{rate:.4g} images/s", f"loss {loss:.4g}"]
        texts += [f"PSNR {self.score['psnr']:.2f}"] if self.score else []
        texts += [f"{skipped} skipped"] if skipped else []
        stage_told = f"stage {number + 1}/{len(self.recipe.stages)}"
        told = [f"step {self.step}/{self.schedule.steps}", f"{stage_told} ({stage.batch} x {stage.crop} px)", *texts]
        told += [f"{share:.1%} waiting for data", left]
        self.log.row(self.step, "  ".join(told), row, now="  ".join([stage_told, *texts, left]))

    def _validate(self, path: Path | None) -> None:
        means, pictures = validate(self.average, self.val, self.recipe.precision)
        self.score, self.validated = means, self.step
        line = "step {}/{}  validation: PSNR {psnr:.2f} (input {input_psnr:.2f}), SSIM {ssim:.4f}"
        told = line.format(self.step, self.schedule.steps, **means)
        self.log.row(self.step, told, {**means, "seconds": round(self.seconds, 1)})
        self.log.pictures(self.step, pictures)
        # The score is written last, because a validation without a score is repeated after a kill.
        if self.workers.first and path is not None and math.isfinite(means["psnr"]):
            self.checkpoints.score(path, means)

    def _finish(self) -> None:
        # Written again, since a kill may have come between the weights and the last checkpoint.
        last = self._write_weights("weights", self.step, self.average.state_dict())
        self.log.plot()
        told = f"the averaged weights are in {last}"
        (self.out / "best.safetensors").unlink(missing_ok=True)  # it holds what was the best before the run continued
        best = self.checkpoints.best_weights()
        if best and best[0] != self.step:
            told += f", those of the best validation, at step {best[0]}, in {self._write_weights('best', *best)}"
        self.say(told)
