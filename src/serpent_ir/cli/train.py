"""The command `serpent train`: trains a network by a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serpent_ir.cli.shell import print_table, say, shell_command
from serpent_ir.errors import UsageError

if TYPE_CHECKING:
    from serpent_ir.training.plan import Plan


@shell_command("Train a network from a recipe. Recipes are in configs/; key=value, as in seed=1, replaces a key.")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Keys of the recipe to set.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the folder out=, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run a few steps of each stage, print what training takes, and write nothing."),
    ] = False,
    images: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --dry-run: pretend that there are N training images.")
    ] = None,
    stop_after_minutes: Annotated[
        float | None, typer.Option(min=0, metavar="MINUTES", help="Save, validate and end after this time.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's event files.")] = False,
) -> None:
    """Train a network; see `serpent_ir.training.run.train`, which raises for an unknown or ill-typed key."""
    from serpent_ir.training import run
    from serpent_ir.training.stopping import StoppedError
    from serpent_ir.training.workers import end_at_exit

    if images is not None and not dry_run:
        raise UsageError("--images only goes with --dry-run; without it, training takes the images that there are")
    given = {"--resume": resume, "--stop-after-minutes": stop_after_minutes is not None, "--tensorboard": tensorboard}
    if dry_run and any(given.values()):
        told = ", ".join(option for option in given if given[option])
        raise UsageError(f"{told}: of no use with --dry-run, which neither trains nor writes; leave one of them out")
    try:
        if dry_run:
            plan = run.plan(config, overrides or (), images=images)
            if plan.first:
                _show(plan)
            return
        run.train(
            config, overrides or (), resume=resume, stop_after_minutes=stop_after_minutes, tensorboard=tensorboard
        )
    except StoppedError as stopped:
        if str(stopped):  # of several processes only one has a message
            say(f"serpent: {stopped}")
        raise typer.Exit(stopped.status) from None
    except ModuleNotFoundError as error:
        if error.name != "yaml":
            raise
        raise UsageError("reading a recipe needs PyYAML: pip install 'serpent-ir[train]'") from None
    except UsageError:
        raise
    except BaseException as error:
        end_at_exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def _show(plan: "Plan") -> None:
    rows = []
    for number, stage in enumerate(plan.stages, 1):
        figures = [f"{stage.crop}", f"{stage.batch}", f"{stage.steps:,}", f"{stage.images:,}"]
        measured = [
            f"{1000 * stage.seconds:.4g}",
            f"{stage.batch / stage.seconds:.4g}",
            f"{stage.memory / 1e9:.2f}",
            f"{stage.steps * stage.seconds / 3600:.2f}",
        ]
        rows.append([f"{number}", *figures, *([stage.error] if stage.error else measured)])
    title = f"{plan.model} {plan.task}, {plan.images:,} training images, {plan.workers} ({plan.device})"
    columns = ("stage", "crop", "batch", "steps", "images", "ms a step", "images/s", "GB", "hours")
    print_table(title, columns, rows)
    validation = plan.validations * plan.validation_seconds / 3600
    print(f"estimated: {plan.hours:.2f} hours, {validation:.2f} of them for {plan.validations} validations")
