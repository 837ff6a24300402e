"""Which process this is of those that a launcher started, as `torchrun` and others say in the environment.

Nothing else in the package reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE or MASTER_ADDR.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from serpent_ir.errors import SerpentError, UsageError

PATIENCE = timedelta(minutes=15)
"""How long a process waits for the others to come. They may still be loading weights."""


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are on all hosts, as RANK and WORLD_SIZE say; 0 of 1 without them.

    Raises UsageError where the two are not numbers, or do not fit together.
    """
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {world} in the environment; a rank is below the size")
    return rank, world


def local_rank() -> int | None:
    """This process's number among those of this host, as LOCAL_RANK says; None where no launcher says it."""
    told = os.environ.get("LOCAL_RANK", "")
    return int(told) if told.isdecimal() else None


def local_world() -> int:
    """How many processes share this host, as LOCAL_WORLD_SIZE says; 1 without it. Raises UsageError for no number."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"LOCAL_WORLD_SIZE is {told!r} in the environment; it must be the number of processes here")
    return int(told)


def can_meet() -> bool:
    """Whether a launcher told where the processes meet."""
    return "MASTER_ADDR" in os.environ


def launched() -> bool:
    """Whether a launcher started this process, which may be the only one, and told where it meets the others."""
    return {"RANK", "LOCAL_RANK"} <= os.environ.keys() and can_meet()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo of PyTorch 2.9 says on stdout whom it is connected to, which would come before our JSON there."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class Meeting:
    """The processes that share a batch, from before the work until each has done its share. A context manager.

    They meet before the work, so that one that never comes is noticed within `PATIENCE`, and one that is killed later
    by its broken connection. Without a place to meet each process is alone.

    Raises SerpentError on entering where the others do not come.
    """

    def __init__(self) -> None:
        self.rank, self.world = rank_and_world()
        self._apart = self.world == 1 or not can_meet()
        self._words: Any = None

    def __enter__(self) -> "Meeting":
        if not self._apart:
            import torch.distributed as dist

            try:
                with _stdout_to_stderr():
                    dist.init_process_group("gloo", timeout=PATIENCE)
                    self._words = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # a share may take long
            except (RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise SerpentError(
                    f"process {self.rank} of {self.world}: the others cannot be met ({reason}); see what they said, "
                    "then call again"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._words is not None:
            import torch.distributed as dist

            dist.destroy_process_group()

    def gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process has to say, in the order of ranks. Waits for the slowest of them.

        So no process ends before the others: `torchrun` stops all where one fails, and a bad image must stop none.
        Raises SerpentError where one is gone.
        """
        if self._words is None:
            return [own]
        import torch.distributed as dist

        everybody: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(everybody, own, group=self._words)
        except RuntimeError:
            raise SerpentError(
                f"process {self.rank} of {self.world}: another one is gone, and its share is not done; call again with "
                "the same --manifest, or with --skip-existing, for the rest"
            ) from None
        return everybody


def own_device(device: str) -> str:
    """`auto` as the GPU of a process that a launcher started; any other name as it is."""
    import torch

    local = local_rank()
    if device == "auto" and local is not None and torch.cuda.is_available():
        return f"cuda:{local % torch.cuda.device_count()}"
    return device
