"""Small networks for tests of what stands around a network."""

import torch
from torch import nn

from serpent_ir import create_model


def small_network(task: str = "") -> nn.Module:
    torch.manual_seed(0)
    return create_model("serpent_b", dim=8, blocks=(1, 1), task=task)


def identity_network(task: str = "") -> nn.Module:
    """A network whose residual is zero: what goes in comes out."""
    model = small_network(task)
    setattr(model, "residual", True)  # noqa: B010
    for parameter in model.get_submodule("head").parameters():
        nn.init.zeros_(parameter)
    return model
