"""What has to stand before any test module is imported."""

import os

# Read when PyTorch is loaded. OpenMP threads that spin while they wait made the tests ten times slower and more where
# another process had one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and torch.utils.flop_counter imports it wherever it is installed.
    os.environ.setdefault("TRITON_INTERPRET", "1")
