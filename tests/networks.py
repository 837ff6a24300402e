"""Small networks for tests of what stands around a network."""

import torch
from torch import nn

from serpent_ir import create_model
from serpent_ir.models import TASK_SCALES


def small_network(task: str = "") -> nn.Module:
    torch.manual_seed(0)
    name = "serpent_l" if task in TASK_SCALES else "serpent_b"
    return create_model(name, dim=8, blocks=(1, 1), task=task)


def identity_network(task: str = "") -> nn.Module:
    """A network whose residual is zero: what goes in comes out."""
    model = small_network(task)
    setattr(model, "residual", True)  # noqa: B010
    for parameter in model.get_submodule("head").parameters():
        nn.init.zeros_(parameter)
    return model
