"""`selective_scan_fn` on the CPU beside a loop over positions in PyTorch, as mamba-ssm's reference has it.

    python benchmarks/sequences_on_cpu.py [--threads 2] [--rounds 5]

The loop below does the operations of `selective_scan_ref`: decays and inputs of all positions at once, then one step
after another. Rounds alternate; medians are printed. Gradients are compared at L 512 only: those of a slice are as
large as what it was cut from, so at L 4096 the loop's backward pass takes minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops import selective_scan_fn

Scan = Callable[..., Tensor]


def loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """One step of every channel and state at a time; B and C are (batch, N, L)."""
    if delta_bias is not None:
        delta = delta + delta_bias[..., None]
    if delta_softplus:
        delta = F.softplus(delta)
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = A.new_zeros(u.shape[0], *A.shape)
    steps = []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + inputs[:, :, t]
        steps.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    y = torch.stack(steps, 2)
    y = y if D is None else y + u * D[:, None]
    return y if z is None else y * F.silu(z)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for length, trains in ((4096, False), (512, True)):
        compare(length, trains, options.rounds)


def compare(length: int, trains: bool, rounds: int) -> None:
    batch, D, N = 1, 360, 16
    g = torch.Generator().manual_seed(0)
    u, delta, z, grad = (torch.randn(batch, D, length, generator=g) for _ in range(4))
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    B, C = (torch.randn(batch, N, length, generator=g) for _ in range(2))
    leaves = [x.requires_grad_(trains) for x in (u, delta - 3, A, B, C, torch.ones(D), z, torch.zeros(D))]

    def work(scan: Scan) -> list[Tensor]:
        out = scan(*leaves, delta_softplus=True)
        return [out, *(torch.autograd.grad(out, leaves, grad) if trains else ())]

    times: dict[str, list[float]] = {"ours": [], "loop": []}
    results: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        for who, scan in (("ours", selective_scan_fn), ("loop", loop)):
            start = time.perf_counter()
            results[who] = work(scan)
            times[who].append(time.perf_counter() - start)
    ours, others = (1e3 * statistics.median(times[who]) for who in ("ours", "loop"))
    differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results.values(), strict=True)]
    what = f"{batch}x{D}x{length} N {N}, {torch.get_num_threads()} threads, forward{' and backward' if trains else ''}"
    print(f"{what}: {ours:.1f} ms; loop {others:.0f} ms; {others / ours:.0f}x; differ by up to {max(differences):.1e}")


if __name__ == "__main__":
    main()
