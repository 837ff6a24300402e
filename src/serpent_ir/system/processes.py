"""Several processes that share many images, as `torchrun` starts them."""

import os
from typing import Any

from serpent_ir.errors import UsageError


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` and others say in RANK and WORLD_SIZE; 0 of 1."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {world} in the environment; a rank is below the size")
    return rank, world


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a `torchrun` has to say, in the order of ranks. Waits for the slowest of them.

    So no process ends before the others: `torchrun` stops all where one fails, and a bad image must stop none.
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
    """How many of this host train, each with images of its own."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"LOCAL_WORLD_SIZE is {told!r} in the environment; it must be the number of processes here")
    return int(told)


def own_device(device: str) -> str:
    """`auto` as the GPU of a process that `torchrun` started."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and local.isdecimal() and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
