"""The processes that train together: this one alone, or those that `torchrun` or `accelerate launch` started.

Several use Hugging Face Accelerate over torch.distributed: NCCL on GPUs, Gloo on CPUs. One alone needs neither.
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
from serpent_ir.system.devices import pick_device
from serpent_ir.system.processes import launched, rank_and_world
from serpent_ir.training.recipe import RecipeError, of_key

T = TypeVar("T")

PATIENCE = timedelta(minutes=15)
"""How long a process waits for the others before it takes them for dead. They may still be reading images."""


class Workers:
    """This process among those of a run. The one with `rank` 0 writes the files and prints.

    `joined` says whether a launcher started them. That may also be a single process. Joined processes agree on what
    they do.
    """

    def __init__(self, device: str = "auto"):
        _, self.world = rank_and_world()
        self.rank = 0
        self._queued: deque[torch.cuda.Event] = deque()  # one after each step that the GPU may not have finished
        shared = device in ("auto", "cuda", "cpu")
        if self.world > 1 and not shared:
            raise RecipeError(f"device is {device!r}; with several processes it must be auto, cuda or cpu")
        with of_key("device"):
            self.device = pick_device(device)
        self.joined = self.world > 1 or (launched() and shared and self.device.type in ("cuda", "cpu"))
        if not self.joined:
            return
        self._joint = _join(self.device.type, self.world)
        self.rank = self._joint.accelerator.process_index
        self.device = self._joint.accelerator.device
        self._words = self._joint.words

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def told(self) -> str:
        """Device and number of processes, for messages."""
        return str(self.device.type) if self.world == 1 else f"{self.world} x {self.device.type}"

    def share(self, samples: range) -> range:
        """This process's part of a batch."""
        size = len(samples) // self.world
        return samples[self.rank * size : (self.rank + 1) * size]

    def take_from_first(self, network: nn.Module) -> None:
        """Copy the network's weights from the first process."""
        for parameter in network.parameters() if self.joined else ():
            torch.distributed.broadcast(parameter.data, src=0)

    def mean_(self, x: Tensor) -> Tensor:
        """Replace `x` by its mean over all processes, with the same bits in each, and return it."""
        torch.distributed.all_reduce(x)
        return x.div_(self.world)

    def queued(self) -> None:
        """Record that a joint step was queued on the GPU."""
        if self.joined and self.device.type == "cuda":
            self._queued.append(torch.cuda.Event())
            self._queued[-1].record()

    def catch_up(self, ahead: int = 0) -> None:
        """Wait until the GPU has done all but `ahead` of the queued steps. Call it before any other waiting.

        If another process is gone, a GPU waits for it forever, and so would a host that waits inside CUDA. Raises
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
        """The first process's value."""
        if not self.joined:
            return what
        box = [what]
        torch.distributed.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def gather(self, what: T) -> list[T]:
        """The values of all processes, in the order of ranks."""
        if not self.joined:
            return [what]
        boxes: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(boxes, what, group=self._words)
        return boxes

    @contextmanager
    def together(self) -> Iterator[None]:
        """If an error means that another process is gone, say so in one line."""
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
        """Part with the others at the exit of this process, unless another training comes first."""
        if self.joined:
            atexit.register(self._joint.accelerator.end_training)


@dataclass(frozen=True)
class _Joint:
    """What connects this process with the others."""

    kind: str  # kind of device
    accelerator: Any
    words: Any  # group for messages between hosts, which must not wait for the GPU as gradients do


_joint: _Joint | None = None
"""Made by the first training of this process and kept for the next ones. Accelerate has one state per process, and the
store at which a launcher lets its processes meet still knows the addresses of a group that has ended."""


def _join(kind: str, world: int) -> _Joint:
    """Meet the others, `world` with this one, unless that was done before. Raises UsageError if that is impossible."""
    global _joint
    if _joint is not None:
        if _joint.kind != kind or not torch.distributed.is_initialized():
            what = f"trained on {_joint.kind}, not {kind}" if _joint.kind != kind else "parted with the others"
            raise UsageError(f"this process, one of several, has {what}; train in a new one")
        atexit.unregister(_joint.accelerator.end_training)  # a training that fails ends without closing NCCL
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
            mixed_precision="no",  # whatever the launcher says, since the recipe sets the precision
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a variable that a launcher should set is missing or wrong
        told = " ".join(str(error).split())
        raise UsageError(
            f"WORLD_SIZE is {world}: no way to meet the others ({told}); use torchrun, or unset WORLD_SIZE"
        ) from None
    if accelerator.num_processes != world or not torch.distributed.is_initialized():
        raise UsageError("serpent train runs data parallel alone; use torchrun, or accelerate launch --multi_gpu")
    _joint = _Joint(kind, accelerator, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    return _joint


def end_at_exit(status: int) -> None:
    """Let this process, whose training failed, exit with `status`, if it is one of several on GPUs.

    NCCL does not release the process at exit while the GPU waits for another one. Functions that were registered with
    atexit earlier are not called, so this is only for a process that does nothing but train.
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
