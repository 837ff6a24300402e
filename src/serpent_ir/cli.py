"""The command `serpent`. Each command is a plain function that Python may call as well; torch is imported inside them.

From Python they raise SerpentError. In the shell an error is one line on stderr and an exit status: 1 where the work
failed, 2 where the call was wrong, 130 where it was interrupted. Results go to stdout, progress and errors to stderr.
"""

import functools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from serpent_ir import __version__
from serpent_ir.errors import SerpentError, UsageError

if TYPE_CHECKING:
    from serpent_ir.image import Picture

Command = TypeVar("Command", bound=Callable[..., None])

app = typer.Typer(
    name="serpent",
    help="Restore images with visual state space networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it would read [key=value] as markup
)

Inputs = Annotated[list[Path], typer.Argument(metavar="INPUT", help="Image files, or folders with subfolders.")]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="OUT", help="A folder; or an image file, where INPUT is one file."),
]
Name = Annotated[
    str | None,
    typer.Option(
        "-n",
        "--name",
        help="Weights, as `serpent models` lists them.  [default: serpent_l.deblur; evaluate: of the task]",
    ),
]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Your own weights (safetensors) instead.")]
Device = Annotated[str, typer.Option(help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps.")]
Task = Annotated[str, typer.Option(help="The degradation: deblur or sr8.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _say(line: str) -> None:
    print(line.replace("\n", " "), file=sys.stderr, flush=True)


def _reporting(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a shell runs it: errors and warnings are one line each on stderr, and set the exit status."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                warnings.filterwarnings("always", category=UserWarning)  # to be shown, whatever -W says
                warnings.filterwarnings("always", message="serpent_ir: ")
                function(*args, **kwargs)
            sys.stdout.flush()
        except SerpentError as error:
            _say(f"serpent: error: {error}")
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except KeyboardInterrupt:
            _say("serpent: interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as in `serpent models | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
            raise typer.Exit(1) from None
        except OSError as error:
            _say(f"serpent: error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
            raise typer.Exit(1) from None

    return run


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"serpent: warning: {str(message).removeprefix('serpent_ir: ')}")


def shell_command(help: str) -> Callable[[Command], Command]:
    """Register a function as a command of the same name, whose errors are reported; the function itself stays plain."""

    def register(function: Command) -> Command:
        app.command(function.__name__, help=help)(_reporting(function))
        return function

    return register


@shell_command("Restore images. Outputs keep size (with sr8, 8 times that), depth, format and metadata.")
def restore(
    inputs: Inputs, output: Output, name: Name = None, weights: Weights = None, device: Device = "auto"
) -> None:
    """Restore image files and folders of them into a folder, or one file into one file.

    A folder is mirrored under `output`, subfolders too. A file that fails is reported on stderr, the others are done.
    Formats that are read but not written become PNG.

    Args:
        inputs: files and folders.
        output: folder, made if missing; or, for one input file, a file with the suffix of an image.
        name: weights that ship (default `serpent_l.deblur`), or the network that `weights` are for.
        weights: safetensors file; without `name`, its metadata says the network.
        device: as `serpent_ir.inference.pick_device` takes it.

    Raises:
        UsageError: before any work, for a missing path, a folder without images, an unknown name or device, or outputs
            that would overwrite an input or each other.
        SerpentError: at the end, where files failed.
    """
    from serpent_ir.degradations import create_degradation
    from serpent_ir.inference import pick_device, restore_picture
    from serpent_ir.models import create_model

    pairs = _plan(inputs, output)
    name = _name(name, weights)
    model = create_model(name, pretrained=weights is None, checkpoint_path=weights)
    task = getattr(model.config, "task", "")
    if not task:
        raise UsageError(f"{weights}: does not say which task it is for; name it with -n, as {name}.deblur")
    create_degradation(task)  # an unknown one is no fault of an image
    model = model.to(pick_device(device))
    _convert(pairs, lambda _, picture: restore_picture(picture, model), "restored")


@shell_command("Degrade clean images. The outputs have 8 bits; sr8 writes the small files.")
def degrade(inputs: Inputs, output: Output, task: Task, seed: Seed = 0) -> None:
    """Write degraded versions of image files and folders of them, in 8 bits, RGB, without alpha.

    The noise of the i-th image is that of the i-th image of an evaluation with this seed (grey images get it in
    colour, as they do there). Images are cropped on the right and bottom to a multiple of the task's scale. Inputs,
    output and errors are those of `restore`.
    """
    import numpy as np

    from serpent_ir.degradations import create_degradation, evaluation_generator
    from serpent_ir.image import to_pixels, to_tensor

    degradation = create_degradation(task)

    def degraded(index: int, picture: "Picture") -> "Picture":
        clean = degradation.crop(to_tensor(picture.pixels))
        y = degradation(clean, generator=evaluation_generator(seed, index))
        profile = None if picture.is_grey else picture.icc_profile  # one for grey does not fit RGB
        return replace(picture, pixels=to_pixels(y, np.uint8), alpha=None, mode="RGB", icc_profile=profile)

    _convert(_plan(inputs, output), degraded, "degraded")


@shell_command("Measure PSNR and SSIM. The clean images of a folder are degraded, restored and compared.")
def evaluate(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of clean images.")],
    task: Task,
    name: Name = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Print what `serpent_ir.evaluate.evaluate` measures: as a table of means, or the whole as one JSON object.

    In JSON a figure that is not finite (the PSNR of identical images) is null.
    """
    from serpent_ir.evaluate import evaluate

    with _progress("evaluated") as progress:
        result = evaluate(
            data, task, _name(name, weights, task), weights=weights, device=device, seed=seed, progress=progress
        )
    if as_json:
        print(json.dumps(_finite(result), allow_nan=False))
        return
    rows = [
        (label, f"{result[prefix + 'psnr']:.2f}", f"{result[prefix + 'ssim']:.4f}")
        for label, prefix in (("input", "input_"), ("restored", ""))
    ]
    title = f"{weights or result['model']}, {task}, {result['n']} images"
    _print_table(title, ("", "PSNR (dB)", "SSIM"), rows)


@shell_command("Train a network by a recipe. Recipes are in configs/; key=value replaces a key, as seed=1.")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Keys of the recipe to set.")
    ] = None,
) -> None:
    """Train a network; see `serpent_ir.train.train`, which raises for a recipe with an unknown or ill-typed key."""
    from serpent_ir.train import train

    try:
        train(config, overrides or ())
    except ModuleNotFoundError as error:
        if error.name != "yaml":
            raise
        raise UsageError("reading a recipe needs PyYAML: pip install 'serpent-ir[train]'") from None


@shell_command("List networks and weights. Also what runs the scan on each device of this machine.")
def models(as_json: Json = False) -> None:
    """Print the networks (parameters, tasks with weights) and the scan backend of each device of this machine.

    In JSON: `models`, a list of {name, params (raw count), tasks}, and `backends`, device -> backend.
    """
    import torch

    from serpent_ir.inference import available_devices
    from serpent_ir.models import create_model, list_models
    from serpent_ir.ops import default_backend

    tasks: dict[str, list[str]] = {name: [] for name in list_models()}
    for weights in list_models(pretrained=True):
        network, _, task = weights.partition(".")
        tasks.setdefault(network, []).append(task)
    rows = []
    for name in list_models():
        with torch.device("meta"):  # nothing is allocated or initialised
            params = sum(p.numel() for p in create_model(name).parameters())
        rows.append({"name": name, "params": params, "tasks": tasks[name]})
    backends = {device: default_backend(torch.device(device)) for device in available_devices()}
    if as_json:
        print(json.dumps({"models": rows, "backends": backends}))
        return
    columns = ("network", "parameters", "tasks with weights")
    _print_table("", columns, [(r["name"], f"{r['params'] / 1e6:.3f} M", ", ".join(r["tasks"]) or "-") for r in rows])
    for device, backend in backends.items():
        print(f"the scan on {device}: {backend}")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"serpent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `serpent` itself."""


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="serpent")


def _name(name: str | None, weights: Path | None, task: str = "") -> str:
    """The model to build: as asked for, else as the weights' metadata say, else the default (of a task)."""
    from serpent_ir.models import DEFAULT_WEIGHTS, list_models, load_weights

    if name is not None:
        return name
    if weights is None:
        of_the_task = f"{DEFAULT_WEIGHTS.partition('.')[0]}.{task}"
        return of_the_task if of_the_task in list_models(pretrained=True) else DEFAULT_WEIGHTS
    network = load_weights(weights)[1].get("network")
    if not network:
        raise UsageError(f"{weights}: does not say which network it is for; name it with -n")
    return network


def _plan(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(file to read, file to write) of each image. Raises UsageError where one would overwrite an input or another."""
    from PIL import Image

    from serpent_ir.data import find_images
    from serpent_ir.image import WRITTEN_SUFFIXES

    def written(path: Path) -> Path:
        return path if path.suffix.lower() in WRITTEN_SUFFIXES else path.with_suffix(".png")

    pairs = []
    if output.suffix.lower() in Image.registered_extensions() and not output.is_dir():
        if len(inputs) != 1 or inputs[0].is_dir():
            raise UsageError(f"{output}: is the name of an image; several images need a folder")
        if not inputs[0].exists():
            raise UsageError(f"{inputs[0]}: no such file or folder")
        if written(output) != output:
            raise UsageError(f"{output}: cannot write {output.suffix}; use {', '.join(WRITTEN_SUFFIXES)}")
        pairs = [(inputs[0], output)]
    else:
        for path in inputs:
            if path.is_dir():
                files = find_images(path)
                inside = output.resolve() != path.resolve() and output.resolve().is_relative_to(path.resolve())
                if inside:  # what an earlier run wrote there is no input
                    files = [file for file in files if not file.resolve().is_relative_to(output.resolve())]
                pairs += [(file, written(output / file.relative_to(path))) for file in files]
            elif path.exists():
                pairs.append((path, written(output / path.name)))
            else:
                raise UsageError(f"{path}: no such file or folder")
    if not pairs:
        raise UsageError(f"{', '.join(map(str, inputs)) or 'no input'}: no images to work on")
    sources = {_identity(source) for source, _ in pairs}
    writers: dict[Path, Path] = {}
    for source, target in pairs:
        if target.exists() and _identity(target) in sources:
            raise UsageError(f"{target}: would overwrite an input; choose another -o")
        if target in writers:
            raise UsageError(f"{target}: both {writers[target]} and {source} would be written to it; run them apart")
        writers[target] = source
    return pairs


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _convert(pairs: list[tuple[Path, Path]], convert: Callable[[int, "Picture"], "Picture"], done: str) -> None:
    """Read, convert and write each image; a failure is reported, the others are done, and SerpentError ends it."""
    from serpent_ir.image import read_image, write_image

    for folder in {target.parent: None for _, target in pairs}:
        _make_folder(folder)  # before any work, or each file would fail for this one reason
    failed = 0
    with _progress(done) as progress:
        for index, (source, target) in enumerate(pairs):
            start = time.perf_counter()
            try:
                write_image(target, convert(index, read_image(source)))
            except (SerpentError, OSError) as error:
                reason = str(error) if str(error).startswith(f"{source}: ") else f"{source}: {error}"
                if len(pairs) == 1:
                    raise SerpentError(reason) from None
                failed += 1
                _say(f"serpent: error: {reason}")
                line = None  # said already
            else:
                line = f"{source} -> {target} ({time.perf_counter() - start:.1f} s)"
            progress(index + 1, len(pairs), line)
    if failed:
        raise SerpentError(f"{failed} of {len(pairs)} images failed; {len(pairs) - failed} {done}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SerpentError(f"{folder}: no folder can be made there ({error.strerror}); choose another -o") from None


def _finite(value: Any) -> Any:
    """The same with every number that JSON has no word for as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=Text(title) if title else None, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))  # as text: a name is no markup
    Console().print(table)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[..., None]]:
    """A function of (done, total, line): moves a bar on a terminal; elsewhere prints the line, or each tenth for ""."""
    if not sys.stderr.isatty():

        def say(done: int, total: int, line: str | None = "") -> None:
            if line:
                _say(f"[{done}/{total}] {line}")
            elif line is not None and done * 10 // total > (done - 1) * 10 // total:
                _say(f"{verb} {done}/{total}")

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(verb, total=None)
        yield lambda done, total, line="": bar.update(row, completed=done, total=total)


if __name__ == "__main__":
    main()
