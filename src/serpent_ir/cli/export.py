"""serpent export."""

from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.shell import Name, Weights, model_name, print_table, say, shell_command


@shell_command("Write a network for other runtimes. The file is run, and kept only if it agrees with the network.")
def export(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")],
    name: Name = None,
    weights: Weights = None,
    format: Annotated[str, typer.Option(help="onnx or pt2 (torch.export).")] = "onnx",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Accept images of any size instead of one size.")] = False,
    size: Annotated[int, typer.Option(help="Side of the image in pixels; with --dynamic, of the largest check.")] = 256,
) -> None:
    """Write a network as a file for ONNX Runtime or PyTorch, as `serpent_ir.export` does, and print the checks."""
    from serpent_ir.export import export_network, network_to_export

    name = model_name(name, weights)
    model, told = network_to_export(name, weights)
    say(f"tracing {name}, then checking the file; this may take some minutes")
    metadata, checks = export_network(model, output, format=format, dynamic=dynamic, size=size, told=told)
    rows = [
        (f"{c.width}x{c.height}", f"{c.relative_error:.1e}", f"{c.file_ms:.0f}", f"{c.network_ms:.0f}") for c in checks
    ]
    print_table(f"{output}: {name}", ("size", "relative error", "file (ms)", "PyTorch (ms)"), rows)
    for key, value in metadata.items():
        print(f"{key}: {value}")
