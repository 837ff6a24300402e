"""The whole use of a network as one graph of PyTorch's operators."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir import __version__
from serpent_ir.degradations import Degradation, create_degradation
from serpent_ir.errors import SerpentError, is_out_of_memory
from serpent_ir.export.portable import portable_selective_scan, portable_ss2d
from serpent_ir.models.mambairv2 import MambaIRv2
from serpent_ir.models.wrappers import network_of

LARGEST = 1 << 16
"""Pixels of a side."""
ARTANH = (1.9999996, 0.66675979, 0.39590061, 0.34222457)
"""2 artanh(w) / w as a polynomial of w^2 in [0, 1/9]: 1.7e-7 from it at most."""


class WholeTask(nn.Module):
    """The whole use of a network: (B, C, H, W) in [0, 1] -> (B, 3, scale H, scale W) in [0, 1].

    The network pads and crops with Python branches on the size. Here the same is done with index arithmetic, which a
    graph for any size can hold. The network then receives a multiple of its own size rule and pads nothing.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        rules = network_of(network)
        config = rules.config
        self.network = network
        self.task = str(getattr(config, "task", ""))
        self.degradation: Degradation | None = create_degradation(self.task) if self.task else None
        self.own_scale = int(getattr(rules, "scale", 1))
        self.upsampling = self.degradation.upsampling if self.degradation else 1
        self.scale = self.own_scale * self.upsampling
        self.channels = int(getattr(config, "in_channels", 3))
        self.multiple = int(getattr(rules, "size_multiple", 1))
        self.mirrored = isinstance(rules, MambaIRv2)
        # PyTorch treats maps of one pixel specially, so the smallest map of a free size has two.
        self.least = self.multiple // self.upsampling + 1

    def metadata(self, batch: int | None) -> dict[str, str]:
        """What a person must know to use the file, except the sizes that it takes."""
        mask = ", then the mask (1 = missing)" if self.channels > 3 else ""
        times = f"{self.scale} " if self.scale > 1 else ""
        how = "mirrored" if self.mirrored else "reflected"
        images = "B" if batch is None else str(batch)
        return {
            "producer": f"serpent-ir {__version__}",
            "task": self.task,
            "input": f"image ({images}, {self.channels}, H, W), float32, RGB in [0, 1]{mask}",
            "output": f"restored ({images}, 3, {times}H, {times}W), float32, RGB, clamped to [0, 1]",
            "size_multiple": str(self.multiple),
            "padding": f"inside: {how} on the right and bottom to size_multiple, cropped after",
        }

    def forward(self, image: Tensor) -> Tensor:
        given = self.degradation.network_input(image) if self.degradation else image
        height, width = (side * self.own_scale for side in given.shape[-2:])
        restored = self.network(self._padded(self._padded(given, -2), -1))[..., :height, :width]
        if self.degradation:
            restored = self.degradation.combine(restored, given)
        return restored.clamp(0, 1)

    def _padded(self, x: Tensor, dim: int) -> Tensor:
        """As the network pads: reflected, or the edge repeated if the pad is not smaller than the side; or mirrored."""
        side = x.shape[dim]
        padded = (side + self.multiple - 1) // self.multiple * self.multiple
        place = torch.arange(padded, device=x.device)
        if self.mirrored:
            place = place % (2 * side)
            return x.index_select(dim, torch.minimum(place, 2 * side - 1 - place))
        reflected = (side - 1) - (place - (side - 1)).abs()
        fits = torch.full((), padded - side) < side
        return x.index_select(dim, torch.where(fits, reflected, place.clamp(max=side - 1)))


def symbolic_ss2d(
    u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, backend: str = "auto"
) -> Tensor:
    """ss2d as one node of an ONNX file, until `export.scan.expand_scans` replaces it."""
    inputs = (u, proj, dt_weight, dt_bias, A_log, D)
    return torch.onnx.ops.symbolic("serpent_ir::ss2d", inputs, dtype=u.dtype, shape=u.shape, version=1)


def symbolic_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """selective_scan_fn as one node of an ONNX file, with sequences (groups, batch, L, d), and what is around it."""
    if B.ndim == 2 or C.ndim == 2:  # the same at all positions: in no network
        return portable_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    groups = max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))
    batch, channels, length = u.shape
    d, states = channels // groups, A.shape[1]
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = written_out_softplus(dt) if delta_softplus else dt

    def walks(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, d)).permute(1, 0, 3, 2)

    def of_positions(x: Tensor) -> Tensor:
        x = x if x.ndim == 4 else x[:, None]
        return x.expand(-1, groups, -1, -1).permute(1, 0, 3, 2)

    rate = A.unflatten(0, (groups, d)).transpose(1, 2)
    inputs = tuple(x.contiguous() for x in (walks(u), walks(dt), of_positions(B), of_positions(C), rate))
    y, last = torch.onnx.ops.symbolic_multi_out(
        "serpent_ir::selective_scan",
        inputs,
        dtypes=(u.dtype, u.dtype),
        shapes=((groups, batch, length, d), (groups, batch, states, d)),
        version=1,
    )
    y, last = (x.permute(1, 0, 3, 2).flatten(1, 2) for x in (y, last))
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), last


def written_out_softplus(x: Tensor) -> Tensor:
    """`scan.softplus`, which tells why."""
    z = torch.exp(-x.abs())
    w = z / (z + 2)
    square = w * w
    *others, series = ARTANH
    for value in others[::-1]:
        series = series * square + value
    return torch.relu(x) + series * w


def trace(
    task: WholeTask, dynamic: bool, size: int, batch: int | None, *, symbolic: bool
) -> torch.export.ExportedProgram:
    """The task as a graph of PyTorch's own operators. `batch` is None for any number of images.

    The scans are nodes of their own for ONNX if `symbolic`, else made of PyTorch's scan operator.
    """
    # The size is neither square nor a multiple; otherwise PyTorch would assume that for all images.
    odd = 3 * task.multiple
    shape = (odd + 1, 2 * odd + 3) if dynamic else (size, size)
    free = {}
    if batch is None:
        free[0] = torch.export.Dim("batch", min=1, max=LARGEST)
    if dynamic:
        free[2] = torch.export.Dim("height", min=task.least, max=LARGEST)
        free[3] = torch.export.Dim("width", min=task.least, max=LARGEST)
    image = torch.rand(batch or 2, task.channels, *shape)
    try:
        program = torch.export.export(
            task,
            (image,),
            dynamic_shapes={"image": free} if free else None,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        operators = torch.ops.serpent_ir
        portable: dict[Any, Any] = {
            operators.ss2d.default: symbolic_ss2d if symbolic else portable_ss2d,
            operators.selective_scan.default: symbolic_selective_scan if symbolic else portable_selective_scan,
        }
        program = program.run_decompositions(portable)
        # These asserts are guesses about the memory layout at the traced size. They decide nothing.
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default:
                program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return program
    except Exception as error:  # torch.export raises a dozen types for code that it cannot trace
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        remedy = "export it without --dynamic and --batch 0" if free else "use PyTorch for this network"
        raise SerpentError(f"this network cannot be exported: {reason[:300]}; {remedy}") from error
