"""Networks as files for other runtimes: ONNX and PyTorch's own pt2, without this package and without its operator.

If `dynamic`, the exported graph takes an image of any size: upsampling (sr8), padding and cropping are inside. The
operator ss2d is replaced by ordinary operators (`scan` for ONNX, `portable` for pt2). Every file that is written has
been run, at up to four sizes, and compared with the network.
"""

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
from torch import Tensor, nn

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.export.portable import portable_ss2d as portable_ss2d
from serpent_ir.export.task import LARGEST, WholeTask, trace
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
_LOGGERS = ("onnxscript", "onnx_ir", "onnx_ir._convenience", "torch.onnx", "torch._export.serde.serialize")


@dataclass(frozen=True)
class Check:
    """One comparison of an exported file with the network, on this CPU. Times are the better of two warm runs, or the
    only one where a run takes seconds.
    """

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
    batch: int | None = 1,
    half: bool = False,
    weights: Path | None = None,
) -> tuple[dict[str, str], list[Check]]:
    """Write the network or weights called `name` (or a network with a file of `weights`) by `export_network`."""
    model, told = network_to_export(name, weights)
    return export_network(model, output, format=format, dynamic=dynamic, size=size, batch=batch, half=half, told=told)


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
    batch: int | None = 1,
    half: bool = False,
    told: dict[str, str] | None = None,
    package: Callable[[bytes], bytes] | None = None,
) -> tuple[dict[str, str], list[Check]]:
    """Write a network as an ONNX or pt2 file, run the file, and compare it with the network.

    Args:
        model: a network on the CPU, in evaluation mode, with `config` (`task`, `in_channels`) and `size_multiple`; or
            a wrapper of one (`models.wrappers`).
        output: the file. It appears whole or not at all, and only if it computes what the network computes.
        format: "onnx" or "pt2".
        dynamic: if true, height and width are free; otherwise both are `size`.
        size: side of the input image in pixels; for a dynamic file, of the largest check.
        batch: images of a call; None for any number.
        half: if true, an ONNX file holds its weights in float16 and is half as large. It still computes in float32, so
            weights that were float16 before, as those that ship, change nothing.
        told: further entries for the metadata.
        package: makes the bytes of the file from those of the ONNX or pt2 file, which are what is checked.

    Returns:
        The metadata of the file (strings), and its checks: four sizes if it is dynamic, else one.

    Raises:
        UsageError: an unknown format, or an impossible size.
        SerpentError: the network cannot be exported (with PyTorch's reason), the file computes something else, a
            package is missing, or the file cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; valid: {', '.join(FORMATS)}")
    if not 1 <= size <= LARGEST:
        raise UsageError(f"the size is {size} px; it must be between 1 and {LARGEST}")
    if batch is not None and not 1 <= batch <= LARGEST:
        raise UsageError(f"a batch of {batch}; it must be 1 or more, or 0 in the command for any number of images")
    if half and format != "onnx":
        raise UsageError("weights in float16 are for --format onnx")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output}: is a folder; name a file" if output.is_dir() else f"{output}: no such folder")
    if (suffix := output.suffix.lower().removeprefix(".")) in FORMATS and suffix != format:
        raise UsageError(f"{output}: ends in .{suffix}, and the format is {format}; choose --format {suffix}")
    model = unwrapped(model, compiled=True)
    rules = network_of(model)
    if format == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    task = WholeTask(model)
    # The graph of an ONNX file is right for Serpent at smaller sizes too, although PyTorch promises less.
    least = 1 if format == "onnx" and isinstance(rules, Serpent) else task.least
    sizes = [(size, size)]
    if dynamic:
        sizes += [(least, least), (size // 2 + least, size // 3 + least), (task.multiple * 2, task.multiple * 3)]
    taken = f"any from {least}x{least} px up" if dynamic else f"exactly {size}x{size} px"
    metadata = {**task.metadata(batch), "size": taken, **(told or {})}
    if format == "onnx":
        metadata["weights"] = "float16, computed in float32" if half else "float32"
    try:
        with _quiet(), torch.no_grad(), whole_file(output) as file:
            program = trace(task, dynamic, size, batch, symbolic=format == "onnx")
            # The content is built in memory, because PyTorch's own writers do not report a full disk clearly.
            content = _onnx(program, metadata, half) if format == "onnx" else _pt2(program, metadata)
            file.write(package(content) if package else content)
            file.flush()
            run = (_onnx_runner if format == "onnx" else _pt2_runner)(content)
            checks = [_check(task, run, batch or 2, *shape) for shape in sizes]
            worst = max(checks, key=lambda check: check.relative_error)
            if not worst.relative_error <= TOLERANCE:
                raise SerpentError(
                    f"{output}: differs from the network by {worst.relative_error:.1e} at {worst.width}x{worst.height} "
                    f"px (at most {TOLERANCE:.0e} is allowed), so it was not kept; try the other format"
                )
    except OSError as error:
        raise SerpentError(f"{output}: cannot be written ({error.strerror or error}); choose another -o") from None
    return metadata, checks


def _onnx(program: torch.export.ExportedProgram, metadata: dict[str, str], half: bool) -> bytes:
    import onnx

    from serpent_ir.export.scan import FORMULATION, expand_scans, weights_in_half

    onnx_program = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["image"], output_names=["restored"]
    )
    assert onnx_program is not None
    model = onnx_program.model_proto
    for node in model.graph.node:  # ONNX's tools expect an empty list to be left out; PyTorch writes one for its scans
        kept = [attribute for attribute in node.attribute if attribute.type != attribute.INTS or attribute.ints]
        del node.attribute[:]
        node.attribute.extend(kept)
    if expand_scans(model):
        metadata["scan"] = FORMULATION
    if half:
        weights_in_half(model)
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def _onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # What it would do to the thousands of nodes of the scans takes seconds, and gains nothing.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _pt2(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def _pt2_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(content)).module()


def _check(task: WholeTask, run: Callable[[Tensor], Tensor], batch: int, height: int, width: int) -> Check:
    image = torch.rand(batch, task.channels, height, width, generator=torch.Generator().manual_seed(height + width))
    image[:, 3:] = image[:, 3:].round()  # a mask

    def timed(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        result, times = function(image), list[float]()
        while len(times) < 2 and sum(times) < 5:  # ONNX Runtime's second run still arranges its memory
            start = time.perf_counter()
            result = function(image)
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
