"""The command `serpent profile`: counts and measures what networks cost."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from serpent_ir.cli.shell import Device, print_table, progress_of, say, shell_command
from serpent_ir.errors import SerpentError, UsageError

Names = Annotated[
    list[str] | None,
    typer.Option("-n", "--name", help="A network; may be repeated.  [default: the paper's eight]"),
]
Precision = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16.")]
Seconds = Annotated[
    float,
    typer.Option(min=0.01, max=3600, help="Seconds to spend on each figure; give more if single calls are slow."),
]


@shell_command("Measure networks: parameters, MACs and FLOPs, time and memory of inference and training.")
def profile(
    name: Names = None,
    size: Annotated[str, typer.Option(help="Sides of the images in pixels, for example 256,512,1024.")] = "256",
    batch: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 1,
    train: Annotated[bool, typer.Option("--train", help="Also measure a training step.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    seconds: Seconds = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of raw figures.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw the figures into this folder.")] = None,
) -> None:
    """Print what `serpent_ir.profiling.profile` measures; "out of memory" is a result like any other."""
    from serpent_ir.profiling.report import draw
    from serpent_ir.profiling.tables import about, markdown, tables

    if as_json and as_markdown:
        raise UsageError("--json and --markdown: give one of them")
    if plot is not None:
        from serpent_ir.profiling.figures import new_figure

        new_figure(1, 1)  # raises at once if a package is missing, not after minutes of measuring
        make_folder(plot, "--plot")
    rows = measured(name, sizes_of(size), batch, train, device, precision, seconds)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif as_markdown:
        print(f"{about(rows)}; 1 MAC = 2 FLOPs, 1 GB = 1e9 bytes\n")
        print("\n".join(markdown(rows)))
    else:
        print(f"{about(rows)}; 1 MAC = 2 FLOPs, 1 GB = 1e9 bytes")
        for title, columns, cells in tables(rows):
            print_table(title, columns, cells)
    if plot is not None:
        say(f"{len(draw(plot, rows, []))} figures are in {plot}")


def make_folder(folder: Path, what: str) -> None:
    """Make a folder. SerpentError if nothing can be written there, at once and not after minutes of measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SerpentError(f"{folder}: cannot be written to ({error.strerror}); choose another {what}") from None


def sizes_of(text: str) -> list[int]:
    """The numbers of "256,512"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--size {text}: give sides in pixels separated by commas, for example 256,512") from None


def measured(
    names: list[str] | None,
    sizes: list[int],
    batch: int,
    train: bool,
    device: str,
    precision: str,
    seconds: float,
    known: Sequence[dict[str, Any]] = (),
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run `profile` and show progress. Without names it measures the networks of the paper."""
    from serpent_ir.models import list_models
    from serpent_ir.profiling import profile
    from serpent_ir.profiling.paper import NAMES

    names = names or [name for name in NAMES if name in list_models()]
    with progress_of("measured") as progress:
        return profile(
            names, sizes, batch=batch, train=train, device=device, precision=precision, seconds=seconds,
            progress=progress, known=known, keep=keep,
        )  # fmt: skip
