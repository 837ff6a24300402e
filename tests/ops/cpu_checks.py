"""What the tests of the C library share."""

import pytest
import torch
from torch import Tensor

from serpent_ir.ops import cpu

LEVELS = [] if cpu.unavailable() else cpu.levels()
needs_library = pytest.mark.skipif(not LEVELS, reason=cpu.unavailable() or "built")


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the backend allocates holds NaN before it is written."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, float("nan"), **options))


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if LEVELS:
        cpu.use_level()
