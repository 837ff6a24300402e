"""Turn a training run into weights to ship: float16 safetensors, their evaluation as JSON, and a model card.

    python tools/pack_weights.py RUN --trained-on "NVIDIA H100" --data DIR [DIR ...] [--train WHAT ...] [--notes FILE]

RUN is a folder of `serpent train`. The float16 file itself is evaluated, on every folder of --data; `photo` is also
measured at a grid of strengths, on the last of these folders. --measure FILE writes what was measured and stops there,
and --measured FILE takes it, so that a GPU may measure what is packed elsewhere. If the run started from shipped
weights, or from those of another run (which may have been stopped before its end), the card tells about both.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import benchmark_figures
import photo_bars
from photo_grid import measure, told
from safetensors.torch import save
from torch import nn

from serpent_ir import create_degradation
from serpent_ir.evaluate import evaluate
from serpent_ir.inference import pick_device
from serpent_ir.models import WEIGHTS_DIR, create_model, load_weights
from serpent_ir.models.seals import sealed

CARD = """# {name}

Network `{model}` ({params:.3f} M parameters) for the task `{task}`: {task_text}.

- **Licence**: {licence}
- **Data**: {data}. What they are, and whose: "Training images" below.
- **Recipe**: Adam, {warmup} steps of warm-up, then a cosine to zero; gradients clipped at {clip:g}; bfloat16
  autocast; averaged weights (decay {ema:g}); seed {seed}. Flips and transposes.
{runs}
- **Cost**: {minutes:.1f} GPU-minutes, validation not counted.
- **Size**: float16, {megabytes:.1f} MB; computed in float32 (bfloat16 autocast on a GPU).

## Quality

RGB, [0, 1], clamped and rounded to 8 bits, no crop, per image and then averaged; `serpent evaluate --seed 0` on
{device}, of this very file. The numbers are those of `{name}.json`.

| images | n | input PSNR | PSNR | input SSIM | SSIM |
| --- | --- | --- | --- | --- | --- |
{rows}
{grid}
## Training images

{images}

## Limits

{limits}
"""

LICENCE = "CC BY-NC-SA 4.0 (file LICENSE in this folder), because the training images are for non-commercial use."
IMAGES = """\
Faces (256x256): 1088 of FFHQ, 850 synthetic ones of One Million Impressions, 170 of the Face Research Lab
London Set.{faces512}
Natural images: 393 of BSDS500 (train and test), 143 of ImageNet. No validation image, nor another image of a face in
one of them, was trained on. FFHQ, One Million Impressions: CC BY-NC-SA 4.0; London Set: CC BY 4.0; BSDS500 and
ImageNet: non-commercial research and education."""
FACES512 = "\nFaces (512x512): 165 of One Million Impressions, 85 of the London Set."
# For weights that were trained only on photographs with free licences, and did not start from others.
FREE_LICENCE = """CC BY-SA 4.0 (file LICENSE in this folder): all training images have free licences. They are in the
  public domain or under CC0, CC BY, BSD or CC BY-SA; whether a network is an adaptation of what it was trained on is
  unsettled, so it has the one licence among them that asks to be passed on."""
FREE_IMAGES = """\
{count} images of 512x512 pixels, of which each run took as many as is said above: reductions and crops of photographs
with free licences. ATTRIBUTION.csv in this folder names author, licence, source page and where it states the licence,
image by image. Left out of the collection were those under GPL and LGPL, those of which only the linked page says which
of several licences they have, those of CC BY without a version or an author, and photographs of guests of one website.
No validation image was trained on."""

TASK_TEXT = {
    "deblur": "Gaussian blur, 61x61 with standard deviation 3.0 px, and Gaussian noise of standard deviation 0.05",
    "sr8": "8 times smaller by antialiased bicubic, and Gaussian noise of standard deviation 0.05",
    "sr2": "2 times smaller by MATLAB's bicubic with antialiasing, in 8 bits, without noise",
    "sr4": "4 times smaller by MATLAB's bicubic with antialiasing, in 8 bits, without noise",
    "photo_x2": "2 times smaller as in `sr2`, then `real`, what lens, sensor, film, camera and messenger do",
    "photo_x4": "4 times smaller as in `sr4`, then `real`, what lens, sensor, film, camera and messenger do",
    "denoise": "Gaussian noise of standard deviation 5/255 to 50/255, of a strength that it is not told",
    "jpeg": "JPEG of quality 10 to 95 with chroma halved, of a quality that it is not told",
    "inpaint": "boxes and strokes are missing; a mask names them",
    "photo": "Gaussian blur of up to 3 px, Gaussian noise of up to 0.06 and JPEG of quality 30 to 100, in that order, "
    "of strengths that it is not told, each left out of 30 % of images, all three of 1 in 37; and `real`, what "
    "lens, sensor, film, camera and messenger do to a picture",
}

ONE_STRENGTH = """\
Trained for one degradation at one strength: a Gaussian blur of 3.0 pixels (`deblur`) or an 8-fold reduction (`sr8`),
with noise of standard deviation 0.05. Other blurs or noise are restored badly, and an undegraded photo is changed.
Mostly faces were seen, of people that the collections above favour; details that it adds may reflect that."""
REDUCED = """\
Made for images reduced by MATLAB's bicubic, without noise, blur or JPEG, as the benchmarks of super-resolution make
them. A photograph that is small otherwise keeps its noise and blocks, or has them sharpened: `photo_x4` is for that. It
was trained on a mean error, and invents no texture."""
SMALL_PHOTOS = """\
Made for small photographs as cameras and messengers leave them. It was trained on a mean error: it is smooth where
detail is lost, and invents no texture. What it takes for noise is removed, fine texture with it."""
LIMITS = {
    "deblur": ONE_STRENGTH,
    "sr8": ONE_STRENGTH,
    "sr2": REDUCED,
    "sr4": REDUCED,
    "photo_x2": SMALL_PHOTOS,
    "photo_x4": SMALL_PHOTOS,
    "denoise": """\
Made for white Gaussian noise, of any strength from 5 to 50 of 255, which it is not told. The noise of a camera is
another one, smoother and stronger in some colours: `serpent_l.photo` is for that. A photo without it loses texture.""",
    "jpeg": """\
Made for one JPEG with chroma halved, of quality 10 to 95, which it is not told. A picture that was reduced afterwards,
or written as JPEG twice, is for `serpent_l.photo`.""",
    "inpaint": """\
Made for boxes and strokes that a mask names. Large holes are filled smoothly: it was trained on a mean error, and
invents no texture.""",
    "photo": """\
Made for what a camera and a messenger do to a good photograph, and for the synthetic chain above. Strong blur, strong
noise and strong JPEG are undone in part. It is not told what is wrong, and now and then judges wrongly: fine regular
texture is taken for noise, detail for blurred detail, and saturated colours may come back with a pattern.""",
}


def _told(run: dict[str, Any]) -> str:
    """A line of the card about one run."""
    stages = ", then ".join(f"{s['steps']} steps of {s['batch']} crops of {s['crop']}" for s in run["stages"])
    stages += f", of which it made the first {run['stopped']}" if "stopped" in run else ""
    cost = f"{run['minutes']:.1f} minutes on {run.get('gpus', 'one')} {run['device']}"
    rate = f"{run.get('loss', 'l1').upper()}; learning rate {run['lr']:g}"
    rate += f"; colours of {run['vivid']:.0%} of the samples made stronger" if run.get("vivid") else ""
    task = "` and `".join(dict.fromkeys(run.get("mix") or [run["task"]]))
    return f"- **Run** (`{task}`, {' + '.join(run['train'])}): {stages}; {rate}; {cost}."


def _training(run: Path, device: str, gpus: int, train: list[str] | None) -> dict[str, Any]:
    """What the card says about a run, and about those that it started from."""
    recipe = json.loads((run / "recipe.json").read_text())
    _, metadata = load_weights(run / "weights.safetensors")
    for stage, steps in zip(recipe["stages"], json.loads(metadata.get("steps", "[]")), strict=False):
        stage["steps"] = steps  # a recipe may give epochs instead
    of_the_machine = ("out", "val", "val_every", "device")
    training = {key: value for key, value in recipe.items() if key not in of_the_machine}
    training["train"] = train or ["/".join(Path(folder).parts[-2:]) for folder in recipe["train"]]
    log = (run / "log.jsonl").read_text().splitlines()
    training |= {"minutes": json.loads(log[-1])["seconds"] / 60, "device": device}
    training |= {"gpus": gpus} if gpus > 1 else {}
    if (step := int(metadata["step"])) != sum(stage["steps"] for stage in recipe["stages"]):
        training["stopped"] = step
    if (start := recipe.get("start")) and (card := WEIGHTS_DIR / f"{start}.json").exists():
        before = json.loads(card.read_text())["training"]
        packed_again = {key: before[key] for key in before if key != "before"} == training
        training["before"] = before["before"] if packed_again else before
    elif start:
        training["before"] = _training(Path(start).parent, device, gpus, train)
    return training


def _licensed(runs: list[dict[str, Any]], attribution: Path | None) -> dict[str, str]:
    """The licence and the images for the card. The attributions go beside the weights."""
    if attribution:
        shutil.copy(attribution, WEIGHTS_DIR / "ATTRIBUTION.csv")
        count = len(attribution.read_text().splitlines()) - 1
        return {"licence": FREE_LICENCE, "images": FREE_IMAGES.format(count=count)}
    larger = "faces512/train" in {folder for run in runs for folder in run["train"]}
    return {"licence": LICENCE, "images": IMAGES.format(faces512=FACES512 if larger else "")}


def _measured(network: nn.Module, file: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a card: evaluations, and of `photo` the grid of strengths and the bars."""
    network_name, _, task = name.partition(".")
    network = network.to(pick_device("auto"))
    grid = measure(network, args.data[-1], args.run / "grid.jsonl") if task == "photo" else None
    bars = photo_bars.measure(network, args.bars) if args.bars else None
    evaluations = []
    for folder in args.data:
        result = evaluate(folder, task, network_name, weights=file)
        del result["images"], result["weights"]
        evaluations.append({**result, "model": name, "data": "/".join(folder.parts[-2:])})
        print(json.dumps(evaluations[-1]))
    return {"evaluations": evaluations, "grid": grid, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--trained-on", required=True, help="name of the device, for the card")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them; the same for runs that it went on from")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders to evaluate on")
    parser.add_argument("--train", nargs="+", help="what the recipe's folders held, where their names do not say")
    parser.add_argument("--attribution", type=Path, help="ATTRIBUTION.csv of the images, if all have free licences")
    parser.add_argument("--bars", type=Path, help="of `photo`: folder with natural, free and real_noise")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure, write this JSON, and stop")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="what --measure wrote, of these weights")
    parser.add_argument(
        "--benchmarks", type=Path, metavar="FILE", help="what benchmark_figures.py wrote of these weights"
    )
    parser.add_argument("--mean", help="of which runs these weights are the mean, as a sentence for the card")
    parser.add_argument("--notes", type=Path, help="text for the card, after its figures")
    args = parser.parse_args()
    recipe = json.loads((args.run / "recipe.json").read_text())
    name = f"{recipe['model']}.{create_degradation(recipe['task']).name}"
    state, metadata = load_weights(args.run / "weights.safetensors")
    training = _training(args.run, args.trained_on, args.gpus, args.train)
    training |= {"mean": args.mean} if args.mean else {}
    if "stopped" in training:
        raise SystemExit(f"{args.run}: stopped at step {training['stopped']}; finish the run first")
    file = args.run / f"{name}.safetensors"  # moved to where weights ship when all is measured
    file.write_bytes(sealed(save({key: tensor.half() for key, tensor in state.items()}, metadata)))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    network = create_model(recipe["model"], checkpoint_path=file)
    found = json.loads(args.measured.read_text()) if args.measured else _measured(network, file, name, args)
    if args.measure:
        args.measure.write_text(json.dumps({"sha256": digest, **found}))
        return
    if found.get("sha256", digest) != digest:
        raise SystemExit(f"{args.measured}: was measured of other weights")
    evaluations, grid, bars = found["evaluations"], found["grid"], found["bars"]
    runs = [training]
    while "before" in runs[0]:
        runs.insert(0, runs[0]["before"])
    card = {"name": name, "sha256": digest}
    card |= {"training": training, "evaluations": evaluations} | ({"grid": grid} if grid else {})
    card |= {"bars": bars} if bars else {}
    benchmarks = json.loads(args.benchmarks.read_text())[name] if args.benchmarks else None
    card |= {"benchmarks": benchmarks} if benchmarks else {}
    (WEIGHTS_DIR / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    row = "| {data} | {n} | {input_psnr:.2f} | {psnr:.2f} | {input_ssim:.4f} | {ssim:.4f} |"
    rows = [row.format(**evaluation) for evaluation in evaluations]
    text = CARD.format(
        **{key: recipe[key] for key in ("model", "task", "warmup", "clip", "ema", "seed")},
        name=name,
        params=sum(p.numel() for p in network.parameters()) / 1e6,
        task_text=TASK_TEXT[recipe["task"]],
        data=", ".join(dict.fromkeys(folder for run in runs for folder in run["train"])),
        **_licensed(runs, args.attribution),
        runs="\n".join([*map(_told, runs), *([f"- **Mean**: {args.mean}"] if args.mean else [])]),
        minutes=sum(run["minutes"] * run.get("gpus", 1) for run in runs),
        megabytes=file.stat().st_size / 1e6,
        device=" and ".join(dict.fromkeys(evaluation["device"] for evaluation in evaluations)),
        rows="\n".join(rows),
        grid=(told(grid) if grid else "")
        + (photo_bars.told(bars) if bars else "")
        + (benchmark_figures.told(benchmarks) if benchmarks else "")
        + (f"\n{args.notes.read_text()}" if args.notes else ""),
        limits=LIMITS[recipe["task"]],
    )
    (WEIGHTS_DIR / f"{name}.md").write_text(text)
    shutil.move(file, WEIGHTS_DIR / file.name)


if __name__ == "__main__":
    main()
