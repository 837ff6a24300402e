"""serpent train."""

from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.shell import shell_command
from serpent_ir.errors import UsageError


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
