"""serpent evaluate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.shell import (
    Device,
    Json,
    Name,
    Seed,
    Task,
    Weights,
    finite,
    model_name,
    print_table,
    progress_of,
    shell_command,
)


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

    with progress_of("evaluated") as progress:
        result = evaluate(
            data, task, model_name(name, weights, task), weights=weights, device=device, seed=seed, progress=progress
        )
    if as_json:
        print(json.dumps(finite(result), allow_nan=False))
        return
    rows = [
        (label, f"{result[prefix + 'psnr']:.2f}", f"{result[prefix + 'ssim']:.4f}")
        for label, prefix in (("input", "input_"), ("restored", ""))
    ]
    title = f"{weights or result['model']}, {task}, {result['n']} images"
    print_table(title, ("", "PSNR (dB)", "SSIM"), rows)
