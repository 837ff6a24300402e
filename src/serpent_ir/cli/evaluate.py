"""The command `serpent evaluate`: measures a network on a folder of images."""

import json
from pathlib import Path
from typing import Annotated

import typer

from serpent_ir.cli.profile import Precision
from serpent_ir.cli.shell import (
    Device,
    Json,
    Seed,
    Task,
    Weights,
    finite,
    model_name,
    print_table,
    progress_of,
    shell_command,
)
from serpent_ir.errors import UsageError


@shell_command("Measure PSNR, SSIM and LPIPS: degrade the clean images of a folder, restore them and compare.")
def evaluate(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of clean images.")],
    task: Task,
    name: Annotated[
        str | None,
        typer.Option("-n", "--name", help="Weights, as `serpent models` lists them.  [default: serpent_l of the task]"),
    ] = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    protocol: Annotated[
        str,
        typer.Option(help="What is compared: rgb, sr (Y, border of the scale cut), denoise, jpeg (Y) or ntire-esr."),
    ] = "rgb",
    lpips_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also measure LPIPS, with this copy of torchvision's alexnet-owt-7be5be79.pth or vgg16-397923af.pth.",
        ),
    ] = None,
    brisque: Annotated[
        bool,
        typer.Option(
            "--brisque",
            help="Of images without a truth: degrade nothing, restore them as they are, and measure BRISQUE alone.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what `serpent_ir.evaluate.evaluate` measures: a table of means, or everything as one JSON object.

    With `brisque` it is what `evaluate_without_truth` measures. In JSON a figure that is not finite (the PSNR of
    identical images) is null.
    """
    from serpent_ir.evaluate import evaluate, evaluate_without_truth

    if brisque:
        if protocol != "rgb" or lpips_weights is not None or seed:
            raise UsageError(
                "--brisque compares with no truth and draws nothing: leave --protocol, --lpips-weights, --seed"
            )
        with progress_of("evaluated") as progress:
            found = evaluate_without_truth(
                data, model_name(name, weights, task), weights=weights, device=device, precision=precision,
                progress=progress,
            )  # fmt: skip
        if as_json:
            print(json.dumps(finite(found), allow_nan=False))
            return
        rows = [["input", f"{found['input_brisque']:.2f}"], ["restored", f"{found['brisque']:.2f}"]]
        left = f", of {found['n_brisque']} that have one" if found["n_brisque"] < found["n"] else ""
        title = f"{weights or found['model']}, {found['n']} images as they are{left}; lower is better"
        print_table(title, ["", "BRISQUE"], rows)
        return
    with progress_of("evaluated") as progress:
        result = evaluate(
            data, task, model_name(name, weights, task), weights=weights, device=device, precision=precision,
            seed=seed, protocol=protocol, lpips_weights=lpips_weights, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(finite(result), allow_nan=False))
        return
    columns, rows = ["", "PSNR (dB)", "SSIM"], []
    for label, prefix in (("input", "input_"), ("restored", "")):
        rows.append([label, f"{result[prefix + 'psnr']:.2f}", f"{result[prefix + 'ssim']:.4f}"])
        if lpips_weights is not None:
            rows[-1].append(f"{result[prefix + 'lpips']:.4f}")
    if lpips_weights is not None:
        columns.append(f"LPIPS ({result['lpips_net']})")
    counted = f", PSNR of the {result['n_psnr']} that are not infinite" if result["n_psnr"] < result["n"] else ""
    by = f", by {protocol}" if protocol != "rgb" else ""
    print_table(f"{weights or result['model']}, {task}, {result['n']} images{by}{counted}", columns, rows)
