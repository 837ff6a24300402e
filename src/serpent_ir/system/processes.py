"""Several processes that share many images, as `torchrun` starts them."""

import os
from typing import Any

from serpent_ir.errors import UsageError


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, from RANK and WORLD_SIZE as `torchrun` sets them; else 0, 1."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {world} in the environment; a rank is below the size")
    return rank, world


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """The values of all processes of a `torchrun`, in the order of ranks. Waits for the slowest process.

    So no process ends before the others: `torchrun` stops all if one fails, and a bad image must not stop the others.
    """
    if rank_and_world()[1] == 1 or "MASTER_ADDR" not in os.environ:
        return [own]
    from datetime import timedelta

    import torch.distributed as dist

    everybody: list[Any] = [None] * rank_and_world()[1]
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        dist.all_gather_object(everybody, own)
    finally:
        dist.destroy_process_group()
    return everybody


def processes_of_host() -> int:
    """How many processes on this host train, each with its own copy of the images."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"LOCAL_WORLD_SIZE is {told!r} in the environment; it must be the number of processes here")
    return int(told)


def own_device(device: str) -> str:
    """Replace `auto` by the GPU of this process, if `torchrun` started it."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and local.isdecimal() and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
