"""serpent report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.profile import Names, Precision, Seconds, measured, sizes_of
from serpent_ir.cli.shell import Device, say, shell_command

SIZES = "256,512,1024,2048"


@shell_command("Write the paper's efficiency figures, redrawn from a profile, beside the numbers that it prints.")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="JSON",
            help="What `serpent profile --json` printed, or results of benchmarks/tables.py; may be repeated. "
            "Without: DIR/profile.json; where there is none, all networks are measured first and it is written.",
        ),
    ] = None,
    name: Names = None,
    size: Annotated[str, typer.Option(help="Sides of the images, where they are measured.")] = SIZES,
    device: Device = "auto",
    precision: Precision = "auto",
    seconds: Seconds = 2.0,
) -> None:
    """Write figures (PNG and SVG) and report.md, as `serpent_ir.report.write` does."""
    from serpent_ir.figures import new_figure
    from serpent_ir.report import load, write

    new_figure(1, 1)  # what is missing is better said before minutes of measuring
    rows, runs = load(source or [])
    if not rows:
        profile = folder / "profile.json"
        if profile.exists():
            say(f"{profile} was measured before; remove it to measure again")
        else:
            measured_rows = measured(name, sizes_of(size), 1, True, device, precision, seconds)
            folder.mkdir(parents=True, exist_ok=True)
            profile.write_text(json.dumps(measured_rows, indent=1) + "\n")
        rows, _ = load([profile])
    files = write(folder, rows, runs)
    say(f"{len(files)} files are in {folder}; begin with {files[-1]}")
