"""The commands `serpent data pack` and `serpent data check`: pack a folder into one file, and verify it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.files import terminated_like_interrupted
from serpent_ir.cli.shell import app, progress_of, say, shell_command

data = typer.Typer(name="data", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, help="Pack images for training into one file, and check such files.")


@shell_command("Decode the images of folders once and pack them into one file that training maps into memory.", data)
def pack(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Folders of images, with subfolders; 'FOLDER[A:B]' picks by number."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The packed set, FILE.serpent.")],
    size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reduce images so that the shorter side has N pixels.")
    ] = None,
) -> None:
    """Write a packed set; see `serpent_ir.data.write_pack`."""
    from serpent_ir.data import write_pack

    start = time.perf_counter()
    with progress_of("packed") as progress, terminated_like_interrupted():
        records = write_pack(folders, output, size=size, progress=progress)
    megabytes = output.stat().st_size / 1e6
    say(f"{output}: {len(records)} images, {megabytes:.1f} MB, {time.perf_counter() - start:.1f} s")


@shell_command("Compare every pixel of packed sets with their checksums.", data)
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Packed sets.")],
) -> None:
    """Report which packed sets are whole. SerpentError names what is damaged in the first one that is not."""
    from serpent_ir.data import Pack

    for file in files:
        pack = Pack(file)
        with progress_of("checked") as progress:
            pack.check(progress)
        say(f"{file}: {len(pack)} images are whole")
