"""The processes that train together: this one alone, or those that `torchrun` or `accelerate launch` started.

Those are Hugging Face Accelerate over torch.distributed: NCCL on GPUs, Gloo on CPUs. One alone needs neither.
"""

import atexit
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.inference import pick_device
from serpent_ir.system.processes import rank_and_world
from serpent_ir.training.recipe import RecipeError, of_key

T = TypeVar("T")

PATIENCE = timedelta(minutes=15)
"""How long a process waits for the others, who may still be reading images, before it takes them for dead."""


class Workers:
    """This process among those of a run; `rank` 0 writes the files and speaks.

    `joined` says whether a launcher started them, which may be one alone, too: then they agree on what they do.
    """

    def __init__(self, device: str = "auto"):
        _, self.world = rank_and_world()
        self.rank = 0
        self._queued: deque[torch.cuda.Event] = deque()  # after each step that the GPU may not have done yet
        shared = device in ("auto", "cuda", "cpu")
        if self.world > 1 and not shared:
            raise RecipeError(f"device is {device!r}; with several processes it must be auto, cuda or cpu")
        with of_key("device"):
            self.device = pick_device(device)
        launched = {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
        self.joined = self.world > 1 or (launched and shared and self.device.type in ("cuda", "cpu"))
        if not self.joined:
            return
        self._joint = _join(self.device.type, self.world)
        self.rank = self._joint.accelerator.process_index
        self.device = self._joint.accelerator.device
        self._words = self._joint.words

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def told(self) -> str:
        """Device and number of processes, for a line."""
        return str(self.device.type) if self.world == 1 else f"{self.world} x {self.device.type}"

    def share(self, samples: range) -> range:
        """This process's part of a batch."""
        size = len(samples) // self.world
        return samples[self.rank * size : (self.rank + 1) * size]

    def take_from_first(self, network: nn.Module) -> None:
        """Give the network the weights that it has in the first process."""
        for parameter in network.parameters() if self.joined else ():
            torch.distributed.broadcast(parameter.data, src=0)

    def mean_(self, x: Tensor) -> Tensor:
        """`x`, replaced by its mean over all processes, the same bits in each."""
        torch.distributed.all_reduce(x)
        return x.div_(self.world)

    def queued(self) -> None:
        """Note that a step of all processes was queued on the GPU."""
        if self.joined and self.device.type == "cuda":
            self._queued.append(torch.cuda.Event())
            self._queued[-1].record()

    def catch_up(self, ahead: int = 0) -> None:
        """Wait until the GPU has done all but so many of the steps that were queued; call it before other waiting.

        Where another process is gone a GPU waits for it for ever, and so would a host that waited in CUDA. Raises
        SerpentError after `PATIENCE`.
        """
        if not self.joined:
            return
        until = time.monotonic() + PATIENCE.total_seconds()
        while len(self._queued) > ahead:
            if self._queued[0].query():
                self._queued.popleft()
            elif time.monotonic() > until:
                raise SerpentError(
                    f"process {self.rank} of {self.world}: its GPU has waited for the others for "
                    f"{PATIENCE.total_seconds() / 60:g} minutes; see what they said, then go on with --resume"
                )
            else:
                time.sleep(0.0005)

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if not self.joined:
            return number
        tensor = torch.tensor(number)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._words)
        return int(tensor)

    def from_first(self, what: T) -> T:
        """What the first process has."""
        if not self.joined:
            return what
        box = [what]
        torch.distributed.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def gather(self, what: T) -> list[T]:
        """What each process has."""
        if not self.joined:
            return [what]
        boxes: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(boxes, what, group=self._words)
        return boxes

    @contextmanager
    def together(self) -> Iterator[None]:
        """Say in one line that another process is gone, where that is what an error means."""
        try:
            yield
        except RuntimeError as error:
            if not self.joined or not _lost(error):
                raise
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0].partition(". ")[0])  # Gloo's source file
            raise SerpentError(
                f"process {self.rank} of {self.world}: another one is gone ({reason}); see what it said, then go on "
                "with --resume"
            ) from None

    def leave(self) -> None:
        """Part with the others at the exit of this process, unless another training comes before."""
        if self.joined:
            atexit.register(self._joint.accelerator.end_training)


@dataclass(frozen=True)
class _Joint:
    """What connects this process with the others."""

    kind: str  # of device
    accelerator: Any
    words: Any  # group for words between the hosts, which must not wait for the GPU as gradients do


_joint: _Joint | None = None
"""Made by the first training of this process and kept for the next ones: Accelerate has one state for a process, and
what a launcher lets its processes meet by still knows the addresses of a group that was ended."""


def _join(kind: str, world: int) -> _Joint:
    """Meet the others, so many with this one, unless that was done before. Raises UsageError where it cannot be."""
    global _joint
    if _joint is not None:
        if _joint.kind != kind or not torch.distributed.is_initialized():
            what = f"trained on {_joint.kind}, not {kind}" if _joint.kind != kind else "parted with the others"
            raise UsageError(f"this process, one of several, has {what}; train in a new one")
        atexit.unregister(_joint.accelerator.end_training)  # a training that fails ends without NCCL's farewell
        return _joint
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ModuleNotFoundError:
        raise UsageError("several processes need Accelerate: pip install 'serpent-ir[train]'") from None
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS", category=UserWarning)  # Accelerate chooses a number
    try:
        accelerator = Accelerator(
            cpu=kind == "cpu",
            mixed_precision="no",  # whatever the launcher says: precision is the recipe's
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a variable that a launcher sets is missing or wrong
        told = " ".join(str(error).split())
        raise UsageError(
            f"WORLD_SIZE is {world}: no way to meet the others ({told}); use torchrun, or unset WORLD_SIZE"
        ) from None
    if accelerator.num_processes != world or not torch.distributed.is_initialized():
        raise UsageError("serpent train runs data parallel alone; use torchrun, or accelerate launch --multi_gpu")
    _joint = _Joint(kind, accelerator, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    return _joint


def end_at_exit(status: int) -> None:
    """Have this process, whose training failed, end with `status` at its exit, if it is one of several on GPUs.

    NCCL does not let go there while the GPU waits for another process. Nothing that was registered with atexit before
    is called: this is for a process that only trains.
    """

    def end() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.cuda.is_initialized():
        atexit.register(end)


def _lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "store")
    )
