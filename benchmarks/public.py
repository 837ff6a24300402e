"""`selective_scan_fn` and the networks that scan on a GPU, beside mamba-ssm's kernel in the same run.

    python benchmarks/public.py [--scans] [--networks] --out benchmarks/results/public.h200.json
    python benchmarks/public.py --counts --out benchmarks/results/public.h200.json   # needs no GPU
    python benchmarks/render.py                # benchmarks/RESULTS.md from the JSON files

mamba-ssm's kernel is the module `selective_scan_cuda`. It takes a minute to build for one architecture from the source
archive on PyPI (`pip download --no-deps --no-binary :all: mamba-ssm`): give `csrc/selective_scan/*.cpp` and `*.cu` to
`torch.utils.cpp_extension.load(name="selective_scan_cuda", ...)` with TORCH_CUDA_ARCH_LIST set and the compiler options
of its `setup.py`, and put the folder on PYTHONPATH. Without it only ours is timed.

Scans: milliseconds by CUDA graph of the forward pass and of the backward pass alone, after both sides' results agreed.
Networks: inference of one image, called and by CUDA graph; the public side is our own module (same weights, same
convolutions) whose scan is written as the releases write it: four stacked copies of the map, projections as einsums,
float32, mamba-ssm's kernel, and the copies put back.
"""

import argparse
import contextlib
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir import acceleration
from serpent_ir.models import create_model, ss2d
from serpent_ir.ops.backends import Sequences
from serpent_ir.ops.cuda import sequence
from serpent_ir.profiling.count import count
from timing import machine, median_ms

SCANS = [  # batch, D, L, groups, gate; N is 16
    (8, 1536, 2048, 1, True),
    (1, 1536, 65536, 1, False),
    (1, 360, 4096, 1, False),
    (2, 192, 16384, 1, False),
    (1, 1440, 4096, 4, False),  # from here on MambaIR's and VMamba's four directions: maps of 64x64 with d 360,
    (8, 1440, 4096, 4, False),
    (1, 1440, 65536, 4, False),
    (4, 480, 16384, 4, False),
    (1, 480, 262144, 4, False),
    (32, 768, 3136, 4, False),
]
N = 16
GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "d_delta_bias")
DIRECT = {"upsampler": "pixelshuffledirect"}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Serpent-B": ("serpent_b", {}),
    "Serpent-L": ("serpent_l", {}),
    "MambaIR light x2": ("mambair_light", {**DIRECT, "scale": 2}),
    "MambaIR light x4": ("mambair_light", {**DIRECT, "scale": 4}),
    "MambaIR x4": ("mambair_sr", {"upsampler": "pixelshuffle", "scale": 4}),
    "MambaIRv2 light x2": ("mambairv2_light", {**DIRECT, "scale": 2}),
    "MaIR tiny x2": ("mair_tiny", {**DIRECT, "scale": 2}),
    "MaIR small x2": ("mair_small", {**DIRECT, "scale": 2}),
    "DVMSR x4": ("dvmsr", {**DIRECT, "scale": 4}),
    "VmambaIR x4": ("vmambair", {"scale": 4}),
    "EAMamba": ("eamamba", {}),
}
SIDES = (256, 1024)
TABLE = ((256, "bfloat16"), (256, "float32"), (1024, "bfloat16"))
BESIDE = "MambaIR light x2"
BESIDE_SIDES = (128, 256)
LONG = 0.3  # seconds of a pass from which on it is timed once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def public_kernel() -> Any:
    """mamba-ssm's extension, or None."""
    try:
        return importlib.import_module("selective_scan_cuda")
    except ImportError as error:
        print(f"ours alone is timed: {error}", file=sys.stderr)
        return None


def inputs(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> tuple[Sequences, Tensor]:
    """What both sides read, sequences in `dtype` and parameters in float32, and a gradient of the output."""
    batch, D, L, groups, gate = shape
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    def of_sequence() -> Tensor:
        return draw(batch, D, L).to(dtype)

    A = -torch.arange(1.0, N + 1, device="cuda").repeat(D, 1)
    B, C = (draw(batch, groups, N, L).to(dtype) for _ in range(2))
    delta = (draw(batch, D, L) - 3).to(dtype)
    given = (of_sequence(), delta, A, B, C, draw(D), of_sequence() if gate else None, draw(D))
    return Sequences.of(given, True), of_sequence()


def graph_ms(call: Callable[[], Any], repeats: int = 15) -> float:
    """Median milliseconds of a call's kernels, replayed from a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, repeats, warmup=2)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def scan_row(kernel: Any, shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> dict[str, Any]:
    given, grad = inputs(shape, dtype)
    u, delta, A, B, C, D, z, bias, softplus = given

    def ours_backward() -> list[Tensor | None]:
        return sequence.backward(grad, None, given)

    row: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype)[6:]}
    if kernel is not None:

        def public_forward() -> list[Tensor]:
            return kernel.fwd(u, delta, A, B, C, D, z, bias, softplus)

        out, states, *gated = public_forward()

        def public_backward() -> list[Tensor]:
            return kernel.bwd(u, delta, A, B, C, D, z, bias, grad, states, out, None, softplus, False)

        grads = public_backward()
        theirs = dict(zip(GRADIENTS, [*grads[:6], grads[7] if z is not None else None, grads[6]], strict=True))
        mine = dict(zip(GRADIENTS, ours_backward(), strict=True))
        differ = {"out": relative(sequence.forward(given)[0], gated[0] if gated else out)}
        differ |= {
            name: relative(a, b) for name, b in theirs.items() if b is not None and (a := mine[name]) is not None
        }
        row["differ"] = differ
        if not max(differ.values()) <= (3e-2 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"results differ: {differ}")
        row |= {"public_forward_ms": graph_ms(public_forward), "public_backward_ms": graph_ms(public_backward)}
    return row | {"forward_ms": graph_ms(lambda: sequence.forward(given)), "backward_ms": graph_ms(ours_backward)}


class PublicScan(torch.autograd.Function):
    """mamba-ssm's kernel with its gradients, without a gate."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, *given: Tensor) -> Tensor:
        u, delta, A, B, C, D, bias = given
        out, states = kernel.fwd(u, delta, A, B, C, D, None, bias, True)
        ctx.kernel = kernel
        ctx.save_for_backward(*given, states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        grads = ctx.kernel.bwd(u, delta, A, B, C, D, None, bias, grad.contiguous(), states, None, None, True, False)
        return None, *grads


def public_directions(kernel: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    """What `ss2d.four_directions` computes, with the operators that the releases use."""

    def four(module: nn.Module, u: Tensor) -> Tensor:
        x_proj, dt_weight, dt_bias, A_logs, Ds = (
            module.get_parameter(name) for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        )
        (_, H, W, d), (rank, states) = u.shape, (dt_weight.shape[2], A_logs.shape[1])
        u = u.permute(0, 3, 1, 2).contiguous()
        two = torch.stack([u.flatten(2), u.mT.contiguous().flatten(2)], 1)
        walks = torch.cat([two, two.flip(-1)], 1)
        proj = torch.einsum("bkdl,kcd->bkcl", walks, x_proj)
        dt, B, C = proj.split([rank, states, states], 2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, dt_weight)
        given = (x.contiguous().float() for x in (walks.flatten(1, 2), dt.flatten(1, 2)))
        B, C = (x.float() for x in (B, C))
        y = PublicScan.apply(kernel, *given, -A_logs.float().exp(), B, C, Ds.float(), dt_bias.float().flatten())
        assert isinstance(y, Tensor)
        y = y.unflatten(1, (4, d))
        rows, columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
        y = rows + columns.unflatten(-1, (W, H)).mT.contiguous().flatten(2)
        return y.mT.contiguous().unflatten(1, (H, W))

    return four


@contextlib.contextmanager
def on_public(kernel: Any) -> Iterator[None]:
    """A context in which `SS2D` scans by the public kernel, in the releases' operators."""
    own = ss2d.four_directions
    setattr(ss2d, "four_directions", public_directions(kernel))  # noqa: B010
    try:
        with acceleration.off():
            yield
    finally:
        setattr(ss2d, "four_directions", own)  # noqa: B010


def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    """The output, and milliseconds and memory of a pass in float32 or under bfloat16 autocast."""
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = model(x)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(x)
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        row: dict[str, Any] = {"gb": (torch.cuda.max_memory_allocated() - held) / 1e9}
        if once > LONG:  # the host is far ahead, so a graph would take as long
            return out, row | {"call_ms": 1e3 * once, "graph_ms": 1e3 * once}
        repeats = max(3, min(15, int(0.15 / once)))
        row |= {"call_ms": median_ms(lambda: model(x), repeats), "graph_ms": graph_ms(lambda: model(x), repeats)}
    return out, row


def network_row(name: str, side: int, dtype: torch.dtype) -> dict[str, Any]:
    preset, fields = NETWORKS[name]
    with torch.device("cuda"):
        model = create_model(preset, **fields).eval()
    _, row = inference(model, torch.rand(1, 3, side, side, device="cuda"), dtype)
    return {"name": name, "size": side, "dtype": str(dtype)[6:], **row}


def counts_row(name: str) -> dict[str, Any]:
    """Parameters, and multiply-accumulates at each size."""
    preset, fields = NETWORKS[name]
    with torch.device("meta"):
        model = create_model(preset, **fields)
    counts = [count(model, side, side) for side in SIDES]
    return {"name": name, "params": counts[0].params, "macs": [one.macs for one in counts]}


def beside_row(kernel: Any, side: int, dtype: torch.dtype) -> dict[str, Any]:
    preset, fields = NETWORKS[BESIDE]
    torch.manual_seed(0)
    model = create_model(preset, **fields).cuda().eval()
    x = torch.rand(1, 3, side, side, device="cuda")
    ours, row = inference(model, x, dtype)
    with on_public(kernel):
        theirs, public = inference(model, x, dtype)
    row |= {f"public_{key}": value for key, value in public.items()}
    return {"name": BESIDE, "size": side, "dtype": str(dtype)[6:], "differ": relative(ours, theirs), **row}


def attempt(what: Callable[..., dict[str, Any]], *given: Any, until: float, **named: Any) -> dict[str, Any]:
    """The row; or the reason why there is none."""
    if time.monotonic() > until:
        return named | {"error": "no time left"}
    try:
        row = what(*given)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        row = named | {"error": str(error).splitlines()[0][:200]}
    gc.collect()
    torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", action="store_true", help="only the scans")
    parser.add_argument("--networks", action="store_true", help="only the networks")
    parser.add_argument("--counts", action="store_true", help="only count what the networks multiply, without a GPU")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; kinds not measured are kept")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.counts:
        record["counts"] = [counts_row(name) for name in NETWORKS]
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/public.py times GPU kernels: no CUDA device here")
    until, kernel = time.monotonic() + args.budget, public_kernel()
    record |= machine()

    def note(kind: str, row: dict[str, Any]) -> None:
        record[kind].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    if args.scans or not args.networks:
        record["scans"] = []
        for shape in SCANS:
            for dtype in (torch.bfloat16, torch.float32):
                told = {"shape": list(shape), "dtype": str(dtype)[6:]}
                note("scans", attempt(scan_row, kernel, shape, dtype, until=until, **told))
    if args.networks or not args.scans:
        record |= {"beside": [], "networks": []}
        for side in BESIDE_SIDES if kernel else ():
            for key, dtype in DTYPES.items():
                told = {"name": BESIDE, "size": side, "dtype": key}
                note("beside", attempt(beside_row, kernel, side, dtype, until=until, **told))
        for name in NETWORKS:
            for side, key in TABLE:
                told = {"name": name, "size": side, "dtype": key}
                note("networks", attempt(network_row, name, side, DTYPES[key], until=until, **told))


if __name__ == "__main__":
    main()
