"""The command `serpent export`: writes a network as a file for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.shell import Name, Weights, model_name, print_table, say, shell_command
from serpent_ir.errors import UsageError


@shell_command("Write a network for other runtimes. The file is run, and kept only if it agrees with the network.")
def export(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")],
    name: Name = None,
    weights: Weights = None,
    format: Annotated[str, typer.Option(help="onnx or pt2 (torch.export).")] = "onnx",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Accept images of any size instead of one size.")] = False,
    size: Annotated[int, typer.Option(help="Side of the image in pixels; with --dynamic, of the largest check.")] = 256,
    batch: Annotated[int, typer.Option(help="Images of a call; 0 for any number.")] = 1,
    half: Annotated[
        bool, typer.Option("--half", help="Keep the weights as float16 (onnx), in half the space.")
    ] = False,
    darktable: Annotated[
        bool, typer.Option("--darktable", help="Write a package (.dtmodel) for darktable's neural restore.")
    ] = False,
) -> None:
    """Write a network as a file for ONNX Runtime or PyTorch, as `serpent_ir.export` does, and print the checks."""
    from serpent_ir.export import export_network, network_to_export
    from serpent_ir.export.darktable import export_for_darktable

    name = model_name(name, weights)
    model, told = network_to_export(name, weights)
    say(f"tracing {name}, then checking the file; this takes a minute or less")
    if darktable:
        if dynamic or half or batch != 1 or format != "onnx" or size != 256:
            raise UsageError("--darktable decides format, size and batch itself: leave those options out")
        if weights is not None:
            raise UsageError(
                f"{weights}: a darktable package needs weights with a free licence, and this file says none"
            )
        metadata, checks = export_for_darktable(name, model, output)
    else:
        metadata, checks = export_network(
            model, output, format=format, dynamic=dynamic, size=size, batch=batch or None, half=half, told=told
        )
    rows = [
        (f"{c.width}x{c.height}", f"{c.relative_error:.1e}", f"{c.file_ms:.0f}", f"{c.network_ms:.0f}") for c in checks
    ]
    print_table(f"{output}: {name}", ("size", "relative error", "file (ms)", "PyTorch (ms)"), rows)
    for key, value in metadata.items():
        print(f"{key}: {value}")
