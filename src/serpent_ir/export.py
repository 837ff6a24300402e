"""Networks as files for other runtimes: ONNX and PyTorch's own pt2, without this package and without its operator.

If `dynamic`, the exported graph takes an image of any size: upsampling (sr8), padding and cropping are inside. The
operator ss2d is replaced by PyTorch's scan operator, which becomes ONNX's Scan. The rows of a map advance side by side
from zero, their last states are combined from row to row, and a second pass starts each row from the right state. Every
file that is written has been run, at up to four sizes, and compared with the network.
"""

import functools
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir import __version__
from serpent_ir.degradations import Degradation, create_degradation
from serpent_ir.errors import SerpentError, UsageError, is_out_of_memory
from serpent_ir.inference.network import check_task
from serpent_ir.models import create_model, licence_of
from serpent_ir.models.serpent import Serpent
from serpent_ir.models.wrappers import network_of, unwrapped
from serpent_ir.system.whole_file import whole_file

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4
"""Largest relative error (norm of the difference over norm) of an exported file compared with the network."""
METADATA_FILE = "serpent_ir.json"
"""The place of a pt2 file's metadata: `torch.export.load(path, extra_files={METADATA_FILE: ""})` fills it in."""
_LARGEST = 1 << 16  # pixels per side
_LOGGERS = ("onnxscript", "onnx_ir", "onnx_ir._convenience", "torch.onnx", "torch._export.serde.serialize")


@dataclass(frozen=True)
class Check:
    """One comparison of an exported file with the network, on this CPU. Times are the better of two warm runs."""

    height: int
    width: int
    relative_error: float
    file_ms: float
    network_ms: float


def export(
    name: str,
    output: Path,
    *,
    format: str = "onnx",
    dynamic: bool = False,
    size: int = 256,
    weights: Path | None = None,
) -> tuple[dict[str, str], list[Check]]:
    """Write the network or weights called `name` (or a network with a file of `weights`) by `export_network`."""
    model, told = network_to_export(name, weights)
    return export_network(model, output, format=format, dynamic=dynamic, size=size, told=told)


def network_to_export(name: str, weights: Path | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The network that `export` writes, and what the file says about it."""
    model = create_model(name, pretrained=weights is None, checkpoint_path=weights)
    if weights is not None:
        check_task(model, weights)
    return model, {"network": name.partition(".")[0]} | (
        {"weights_licence": licence_of(name)} if weights is None else {}
    )


def export_network(
    model: nn.Module,
    output: Path,
    *,
    format: str = "onnx",
    dynamic: bool = False,
    size: int = 256,
    told: dict[str, str] | None = None,
) -> tuple[dict[str, str], list[Check]]:
    """Write a network as an ONNX or pt2 file, run the file, and compare it with the network.

    Args:
        model: a network on the CPU, in evaluation mode, with `config` (`task`, `in_channels`) and `size_multiple`; or
            a wrapper of one (`models.wrappers`).
        output: the file. It appears whole or not at all, and only if it computes what the network computes.
        format: "onnx" or "pt2".
        dynamic: if true, height and width are free; otherwise both are `size`.
        size: side of the input image in pixels; for a dynamic file, of the largest check.
        told: further entries for the metadata.

    Returns:
        The metadata of the file (strings), and its checks: four sizes if it is dynamic, else one.

    Raises:
        UsageError: an unknown format, or an impossible size.
        SerpentError: the network cannot be exported (with PyTorch's reason), the file computes something else, a
            package is missing, or the file cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; valid: {', '.join(FORMATS)}")
    if not 1 <= size <= _LARGEST:
        raise UsageError(f"the size is {size} px; it must be between 1 and {_LARGEST}")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output}: is a folder; name a file" if output.is_dir() else f"{output}: no such folder")
    if (suffix := output.suffix.lower().removeprefix(".")) in FORMATS and suffix != format:
        raise UsageError(f"{output}: ends in .{suffix}, and the format is {format}; choose --format {suffix}")
    model = unwrapped(model, compiled=True)
    rules = network_of(model)
    if (scale := getattr(rules, "scale", 1)) != 1 and not isinstance(rules, Serpent):
        raise UsageError(f"a network that makes images {scale} times larger by itself cannot be exported")
    if format == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    task = _WholeTask(model)
    # The graph of an ONNX file is right for Serpent at smaller sizes too, although PyTorch promises less.
    least = 1 if format == "onnx" and isinstance(rules, Serpent) else task.least
    sizes = [(size, size)]
    if dynamic:
        sizes += [(least, least), (size // 2 + least, size // 3 + least), (task.multiple * 2, task.multiple * 3)]
    taken = f"any from {least}x{least} px up" if dynamic else f"exactly {size}x{size} px"
    metadata = {**task.metadata(), "size": taken, **(told or {})}
    try:
        with _quiet(), torch.no_grad(), whole_file(output) as file:
            program = _program(task, dynamic, size)
            # The content is built in memory, because PyTorch's own writers do not report a full disk clearly.
            content = (_onnx if format == "onnx" else _pt2)(program, metadata)
            file.write(content)
            file.flush()
            run = (_onnx_runner if format == "onnx" else _pt2_runner)(content)
            checks = [_check(task, run, *shape) for shape in sizes]
            worst = max(checks, key=lambda check: check.relative_error)
            if not worst.relative_error <= TOLERANCE:
                raise SerpentError(
                    f"{output}: differs from the network by {worst.relative_error:.1e} at {worst.width}x{worst.height} "
                    f"px (at most {TOLERANCE:.0e} is allowed), so it was not kept; try the other format"
                )
    except OSError as error:
        raise SerpentError(f"{output}: cannot be written ({error.strerror or error}); choose another -o") from None
    return metadata, checks


class _WholeTask(nn.Module):
    """The whole use of a network: (1, C, H, W) in [0, 1] -> (1, 3, scale H, scale W) in [0, 1].

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
        # PyTorch treats maps of one pixel specially, so the smallest map of a free size has two.
        self.least = self.multiple // self.upsampling + 1

    def metadata(self) -> dict[str, str]:
        """What a person must know to use the file, except the sizes that it takes."""
        mask = ", then the mask (1 = missing)" if self.channels > 3 else ""
        times = f"{self.scale} " if self.scale > 1 else ""
        return {
            "producer": f"serpent-ir {__version__}",
            "task": self.task,
            "input": f"image (1, {self.channels}, H, W), float32, RGB in [0, 1]{mask}",
            "output": f"restored (1, 3, {times}H, {times}W), float32, RGB, clamped to [0, 1]",
            "size_multiple": str(self.multiple),
            "padding": "inside: reflected on the right and bottom to size_multiple, cropped after",
        }

    def forward(self, image: Tensor) -> Tensor:
        given = self.degradation.network_input(image) if self.degradation else image
        height, width = (side * self.own_scale for side in given.shape[-2:])
        restored = self.network(self._padded(self._padded(given, -2), -1))[..., :height, :width]
        if self.degradation:
            restored = self.degradation.combine(restored, given)
        return restored.clamp(0, 1)

    def _padded(self, x: Tensor, dim: int) -> Tensor:
        """As `image.pad_to_multiple`: reflected, or the edge repeated if the pad is not smaller than the side."""
        side = x.shape[dim]
        padded = (side + self.multiple - 1) // self.multiple * self.multiple
        place = torch.arange(padded, device=x.device)
        reflected = (side - 1) - (place - (side - 1)).abs()
        fits = torch.full((), padded - side) < side
        return x.index_select(dim, torch.where(fits, reflected, place.clamp(max=side - 1)))


def _program(task: _WholeTask, dynamic: bool, size: int) -> torch.export.ExportedProgram:
    """The task as a graph of PyTorch's own operators."""
    # The size is neither square nor a multiple; otherwise PyTorch would assume that for all images.
    odd = 3 * task.multiple
    shape = (odd + 1, 2 * odd + 3) if dynamic else (size, size)
    sides = {2: torch.export.Dim("height", min=task.least, max=_LARGEST)}
    sides[3] = torch.export.Dim("width", min=task.least, max=_LARGEST)
    image = torch.rand(1, task.channels, *shape)
    try:
        program = torch.export.export(
            task,
            (image,),
            dynamic_shapes={"image": sides} if dynamic else None,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        program = program.run_decompositions({torch.ops.serpent_ir.ss2d.default: portable_ss2d})
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
        remedy = "export it without --dynamic, at one --size" if dynamic else "use PyTorch for this network"
        raise SerpentError(f"this network cannot be exported: {reason[:300]}; {remedy}") from error


def portable_ss2d(
    u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, backend: str = "auto"
) -> Tensor:
    """`serpent_ir.ops.ss2d` by PyTorch's scan operator, for graphs of any size, in H + 2 W and W + 2 H steps."""

    def lines(first: int, u: Tensor, proj: Tensor) -> Tensor:
        """Directions `first` and `first + 2`, which walk the rows of u (B, rows, columns, d) forward and backward."""
        params = [p[first::2] for p in (dt_weight, dt_bias, A_log, D)]
        return _scan_lines(u, proj[..., first, :], proj[..., first + 2, :], *params)

    by_columns = lines(1, u.transpose(1, 2), proj.transpose(1, 2))
    return lines(0, u, proj) + by_columns.transpose(1, 2)


def _scan_lines(
    u: Tensor, proj: Tensor, proj_back: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> Tensor:
    """Scan row by row, and the same backward. u (B, rows, columns, d); parameters of the two directions (2, d, ...)."""
    from torch._higher_order_ops.scan import scan_op  # `torch.scan` would compile its steps, which fails to nest here

    batch, rows, _, d = u.shape
    states = A_log.shape[-1]
    walks = torch.stack([u, u.flip(1, 2)])  # (2, B, rows, columns, d)
    low, B, C = torch.stack([proj, proj_back.flip(1, 2)]).split([dt_weight.shape[-1], states, states], dim=-1)
    dt = F.softplus(low @ dt_weight.transpose(1, 2)[:, None, None] + dt_bias[:, None, None, None])
    A = -A_log.exp()[:, None, None]  # (2, 1, 1, d, N)
    decay = torch.exp(dt.sum(3)[..., None] * A)  # over a whole row

    # `contiguous` is not used: it keeps the strides of sides of one pixel, and scan wants all steps alike.
    dense = functools.partial(torch.clone, memory_format=torch.contiguous_format)

    def columns_first(x: Tensor) -> Tensor:
        return dense(x.movedim(3, 0))

    # The axes of the states are added beforehand, so that a step has only five operators.
    steps = [columns_first(x) for x in (dt[..., None], (dt * walks)[..., None], B[..., None, :])]
    # A goes through the loops as a state that stays: OpenVINO reads no body that uses a value from outside of it.
    ends, _ = scan_op(_state, [walks.new_zeros(2, batch, rows, d, states), A], steps, ())
    by_row = [dense(x.movedim(2, 0)) for x in (decay, ends)]
    _, starts = scan_op(_next_row, [walks.new_zeros(2, batch, d, states)], by_row, ())
    outputs = [*steps, columns_first(C[..., None])]
    _, _, y = scan_op(_output, [dense(starts.movedim(0, 2)), A], outputs, ())
    y = y[..., 0].movedim(0, 3) + D[:, None, None, None] * walks
    return y[0] + y[1].flip(1, 2)


def _state(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor) -> list[Tensor]:
    return [torch.exp(dt * A) * h + dtu * B, A.clone()]


def _next_row(h: Tensor, decay: Tensor, end: Tensor) -> list[Tensor]:
    return [decay * h + end, h.clone()]


def _output(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    h, A = _state(h, A, dt, dtu, B)
    return [h, A, h @ C]


def _onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    onnx_program = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["image"], output_names=["restored"]
    )
    assert onnx_program is not None
    for node in onnx_program.model.graph.all_nodes():  # including those in the bodies of loops
        # ONNX's tools expect an empty list to be left out, but PyTorch writes one for scans without outputs.
        for name in [name for name, attribute in node.attributes.items() if attribute.value == ()]:
            del node.attributes[name]
    onnx_program.model.metadata_props.update(metadata)
    return onnx_program.model_proto.SerializeToString()


def _onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _pt2(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def _pt2_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(content)).module()


def _check(task: _WholeTask, run: Callable[[Tensor], Tensor], height: int, width: int) -> Check:
    image = torch.rand(1, task.channels, height, width, generator=torch.Generator().manual_seed(height + width))
    image[:, 3:] = image[:, 3:].round()  # a mask

    def timed(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        result = function(image)
        times = []
        for _ in range(2):  # ONNX Runtime's second run still arranges its memory
            start = time.perf_counter()
            function(image)
            times.append(time.perf_counter() - start)
        return result, 1000 * min(times)

    expected, network_ms = timed(task)
    got, file_ms = timed(run)
    error = ((got - expected).norm() / expected.norm()).item() if got.shape == expected.shape else float("inf")
    return Check(height, width, error, file_ms, network_ms)


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SerpentError(f"this export needs {', '.join(missing)}: pip install 'serpent-ir[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what PyTorch's exporters print and warn about their own code."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
