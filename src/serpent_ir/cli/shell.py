"""What the commands of `serpent` share: the application, error reporting, options, tables and progress."""

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from serpent_ir import __version__
from serpent_ir.errors import SerpentError, UsageError, is_out_of_memory, memory_line
from serpent_ir.system import interrupts
from serpent_ir.system.memory import WORK, check_process

Command = TypeVar("Command", bound=Callable[..., None])

app = typer.Typer(
    name="serpent",
    help="Restore images with visual state space networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, since markup would swallow [key=value]
)

Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT",
        help="Image files, folders with subfolders, 'patterns', @LIST (a file of names) or - (names from stdin).",
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="OUT", help="A folder, or an image file if INPUT is one file."),
]
Name = Annotated[
    str | None,
    typer.Option(
        "-n",
        "--name",
        help="Weights, as `serpent models` lists them.  [default: serpent_l.photo]",
    ),
]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Use this weights file: safetensors or .pth.")]
Device = Annotated[str, typer.Option(help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1 or mps.")]
Task = Annotated[
    str,
    typer.Option(
        help="The degradation: deblur, sr8, denoise, jpeg, inpaint, photo, real, sr2, sr4, photo_x2 or photo_x4."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Strength = Annotated[
    float, typer.Option(help="How much of the change is made: 0 (none) to 1.5 (further than the network goes).")
]
Auto = Annotated[
    bool | None,
    typer.Option(
        "--auto/--no-auto",
        help="Leave out changes that do not look like the repair of damage.  [default: with weights of photo]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def say(line: str) -> None:
    """Print one line on stderr. Control characters, which a file name may contain, are escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    sys.stderr.write(f"{shown}\n")  # one write: print writes the line end separately, and several threads call this
    sys.stderr.flush()


def _reporting(function: Callable[..., None]) -> Callable[..., None]:
    """The function as the shell runs it: errors and warnings become one line each on stderr and set the exit status."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with interrupts.working(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                warnings.filterwarnings("always", category=UserWarning)  # shown whatever -W says
                warnings.filterwarnings("always", message="serpent_ir: ")
                warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters is our own error
                _check_room()
                function(*args, **kwargs)
            sys.stdout.flush()
        except SerpentError as error:
            say(f"serpent: error: {error}")
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except KeyboardInterrupt:
            say(interrupts.LINE)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has ended, as in `serpent models | head -1`
            raise typer.Exit(1) from None
        except Exception as error:
            if is_out_of_memory(error):
                say(f"serpent: error: {memory_line(error)}")
            elif isinstance(error, OSError):
                say(f"serpent: error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
            else:
                raise
            raise typer.Exit(1) from None

    return run


def _check_room() -> None:
    """Check free memory first: with too little, libraries end the process silently or without naming a remedy."""
    check_process(WORK if "torch" in sys.modules else _size_of_torch() + 3 * WORK)


def _size_of_torch() -> int:
    """Bytes that PyTorch's libraries take when they are loaded."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sum(file.stat().st_size for folder in folders for file in Path(folder, "lib").glob("libtorch_*.so"))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"serpent: warning: {str(message).removeprefix('serpent_ir: ')}")


def shell_command(help: str, group: typer.Typer = app) -> Callable[[Command], Command]:
    """Register a function as the command of the same name, with errors reported. The function itself stays plain."""

    def register(function: Command) -> Command:
        group.command(function.__name__, help=help)(_reporting(function))
        return function

    return register


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


def model_name(name: str | None, weights: Path | None, task: str = "") -> str:
    """The model to build: the one asked for, else the one named in the weights' metadata, else the (task's) default."""
    from serpent_ir.degradations import create_degradation
    from serpent_ir.models import DEFAULT_WEIGHTS, list_models, load_weights, preset_of, recognise
    from serpent_ir.models.shapes import shapes_of

    if name is not None:
        return name
    if weights is None:
        of_the_task = f"{DEFAULT_WEIGHTS.partition('.')[0]}.{task}"
        if task and of_the_task not in list_models(pretrained=True):
            create_degradation(task)  # an unknown task has no weights either, and this says so
            raise UsageError(f"no weights for {task} ship; give a file of them: --weights FILE")
        return of_the_task if task else DEFAULT_WEIGHTS
    state, metadata = load_weights(weights)
    network = metadata.get("network") or preset_of(recognise(shapes_of(state)))
    if not network:
        raise UsageError(f"{weights}: the file does not say which network it is for; name the network with -n")
    return network


def finite(value: Any) -> Any:
    """The same value with None in place of every number that JSON cannot express."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=Text(title) if title else None, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, so that a name is not read as markup
    Console().print(table)


@contextmanager
def progress_of(verb: str) -> Iterator[Callable[..., None]]:
    """A function of (done, total, line) that shows progress. `done` may be fractional.

    On a terminal it moves a bar. Elsewhere it prints the line, or one line per tenth if the line is "".
    """
    if not sys.stderr.isatty():

        def show(done: float, total: int, line: str | None = "") -> None:
            if line:
                say(f"[{int(done)}/{total}] {line}")
            elif line is not None and done * 10 // total > (done - 1) * 10 // total:
                say(f"{verb} {done}/{total}")

        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(verb, total=None)
        yield lambda done, total, line="": bar.update(row, completed=done, total=total)
