"""The processes that train together: this one alone, or those that `torchrun` or `accelerate launch` started.

Several are Hugging Face Accelerate over torch.distributed: NCCL on GPUs, Gloo on CPUs. One needs neither.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.inference import pick_device

T = TypeVar("T")

PATIENCE = timedelta(minutes=15)
"""How long a process waits for the others, who may still be reading images, before it takes them for dead."""


class Workers:
    """This process among those of a run; `rank` 0 writes the files and speaks."""

    def __init__(self, device: str = "auto"):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        if self.world == 1:
            self.device = pick_device(device)
            return
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs
        except ModuleNotFoundError:
            raise UsageError("several processes need Accelerate: pip install 'serpent-ir[train]'") from None
        if device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"device is {device!r}; with several processes it must be auto, cuda or cpu")
        pick_device(device)  # raises where there is none
        self._accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no",  # whatever the launcher says: precision is the recipe's
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.rank = self._accelerator.process_index
        self.device = self._accelerator.device
        if self._accelerator.num_processes != self.world or not torch.distributed.is_initialized():
            raise UsageError("serpent train runs data parallel alone; use torchrun, or accelerate launch --multi_gpu")
        # Words between the hosts go another way than gradients: they must not wait for the GPU.
        self._words: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

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

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over all processes, and whose weights are those of the first."""
        if self.world == 1:
            return network
        # Said of the weights of depthwise convolutions, whose one input channel may have any stride.
        warnings.filterwarnings("ignore", "Grad strides do not match", category=UserWarning)
        return self._accelerator.prepare_model(network)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay here."""
        return nullcontext() if self.world == 1 else self._accelerator.no_sync(network)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all processes, the same bits in each."""
        if self.world == 1:
            return x
        total: Any = self._accelerator.reduce(x, "mean")
        return total

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._words)
        return int(tensor)

    def from_first(self, what: T) -> T:
        """What the first process has."""
        if self.world == 1:
            return what
        box = [what]
        torch.distributed.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def gather(self, what: T) -> list[T]:
        """What each process has."""
        if self.world == 1:
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
            if self.world == 1 or not _lost(error):
                raise
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise SerpentError(
                f"process {self.rank} of {self.world}: another one is gone ({reason}); see what it said, then go on "
                "with --resume"
            ) from None

    def leave(self) -> None:
        """End what connects the processes."""
        if self.world > 1:
            self._accelerator.end_training()


def _lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "store")
    )
