"""A way: what replaces a class's `forward`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Way:
    """A way to the numbers of a class's `forward`, up to rounding: call `way(module, x)` if `way.serves(module, x)`.

    Args:
        name: what `why` calls it.
        device: the type of device that it is for. A test on a CPU makes a second one for "cpu" (`dataclasses.replace`).
        tape: whether gradients may be wanted: never (False), always (True), or either (None).
        refuses: returns why it may not take a module and its input, in words; "" if it may.
        run: returns what the module would return.
        ahead: starts on what the module would return before it is known whether the way may take it, which costs no
            time on a GPU: the check goes on beside it. None where it does not. If the check fails, it was in vain, so
            it must be safe for any module and input.
        traced: whether it consists of PyTorch's operators only, so that compilers may look into it.
    """

    name: str
    device: str
    tape: bool | None
    refuses: Callable[[Any, Tensor], str]
    run: Callable[[Any, Tensor], Tensor]
    traced: bool = False
    ahead: Callable[[Any, Tensor], Tensor | None] | None = None

    def serves(self, module: Any, x: Tensor) -> bool:
        return x.device.type == self.device and self.in_mode() and not self.refuses(module, x)

    def in_mode(self) -> bool:
        """Whether it is for what is wanted here, inference or training."""
        return self.tape is None or self.tape == torch.is_grad_enabled()

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return self.run(module, x)
