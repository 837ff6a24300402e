"""What has to stand before any test module is imported."""

import os
from importlib import metadata, util

# Read when PyTorch is loaded. OpenMP threads that spin while they wait made the tests ten times slower and more where
# another process had one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and torch.utils.flop_counter imports it wherever it is installed.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _mend_the_interpreter_of_triton() -> None:
    """Up to Triton 3.6 it makes a Python integer of an array of one element, which NumPy 2.4 refuses (1.25 warned).

    PyTorch 2.9 and 2.10 come with such a Triton. Its compiler, which runs the kernels on GPUs, is not concerned.
    """
    from triton.runtime import interpreter

    of_triton = interpreter._patch_lang_tensor

    def patch(tensor, *scope):  # a scope since 3.6
        of_triton(tensor, *scope)
        (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


interpreted = os.environ.get("TRITON_INTERPRET") == "1" and util.find_spec("triton")
if interpreted and tuple(map(int, metadata.version("triton").split(".")[:2])) < (3, 7):
    _mend_the_interpreter_of_triton()
