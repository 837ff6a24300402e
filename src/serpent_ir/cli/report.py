"""The command `serpent report`: redraws the paper's efficiency figures on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from serpent_ir.cli.profile import Names, Precision, Seconds, make_folder, measured, sizes_of
from serpent_ir.cli.shell import Device, say, shell_command

Rows = list[dict[str, Any]]
SIZES = "256,512,1024,2048"


@shell_command("Redraw the paper's efficiency figures from a profile, beside the numbers that the paper prints.")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="JSON",
            help="Output of `serpent profile --json`, or results of benchmarks/tables.py; may be repeated. By default "
            "DIR/profile.json is used; if it does not exist, all networks are measured first and it is written. "
            "Rows are kept as they arrive, so after an interruption the same command continues.",
        ),
    ] = None,
    name: Names = None,
    size: Annotated[str, typer.Option(help="Sides of the images in pixels, if they are measured.")] = SIZES,
    device: Device = "auto",
    precision: Precision = "auto",
    seconds: Seconds = 2.0,
) -> None:
    """Write figures (PNG and SVG) and report.md, as `serpent_ir.profiling.report.write` does."""
    from serpent_ir.profiling.figures import new_figure
    from serpent_ir.profiling.report import write
    from serpent_ir.profiling.rows import load

    new_figure(1, 1)  # raises at once if a package is missing, not after minutes of measuring
    rows, runs = load(source or [])
    make_folder(folder, "DIR")
    if not rows:
        profile = folder / "profile.json"
        if profile.exists():
            say(f"{profile} was measured before; remove it to measure again")
        else:
            part = folder / "profile.part.json"
            known = _known(part, seconds)

            def keep(rows: Rows) -> None:
                content = {"seconds": seconds, "rows": rows + [row for row in known if row not in rows]}
                _write_json(part, content)

            if known:
                say(f"{part}: goes on from {len(known)} rows")
            say(f"{profile} is to be measured first")
            all_rows = measured(name, sizes_of(size), 1, True, device, precision, seconds, known, keep)
            _write_json(profile, all_rows)
            part.unlink(missing_ok=True)
        rows, _ = load([profile])
    files = write(folder, rows, runs)
    say(f"{len(files)} files are in {folder}; begin with {files[-1]}")


def _write_json(path: Path, content: object) -> None:
    from serpent_ir.image import replacing

    with replacing(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def _known(part: Path, seconds: float) -> Rows:
    """The rows that an interrupted call with the same `seconds` left; [] if there are none."""
    from serpent_ir.profiling.rows import MEASURED, is_row

    try:
        content = json.loads(part.read_text())
        rows = content["rows"] if content["seconds"] == seconds else []
        if all(is_row(row) and row.keys() >= set(MEASURED) for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return []
