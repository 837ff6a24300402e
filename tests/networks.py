"""Small networks for tests of what stands around a network."""

from typing import TypeVar

import torch
from torch import nn

from serpent_ir import create_model
from serpent_ir.models import TASK_SCALES
from serpent_ir.models.serpent import VSSBlock

Module = TypeVar("Module", bound=nn.Module)


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


def stir(module: Module) -> Module:
    """Weights away from those that hide mistakes: zeros, ones, and one A for all."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def stirred_block(channels: int) -> VSSBlock:
    torch.manual_seed(0)
    return stir(VSSBlock(channels))
