"""What a user calls, against the network's own time: images, folders, videos and the start of the command.

    python benchmarks/end_to_end.py [images batches video start] [--against REV] --out benchmarks/results/NAME.json
    python benchmarks/render.py                # benchmarks/RESULTS.md from the JSON files

With `--against`, another commit of this repository (or a folder that holds its `src`) is measured side by side: each
tree has a process of its own, and they take turns. Times are medians on the clock, with the device's work awaited.
*network* is a plain call of the network on an input that is on the device. What bounds a call is measured apart:
decoding, upload, network, download and encoding, each alone. Images a second of a folder are counted by when its files
were written: from a quarter of them on, when everything that has to start has started.
"""

import argparse
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

from serpent_ir.ops import cpu

SIZES = {"12 MP": (3000, 4000), "1080p": (1080, 1920), "256": (256, 256)}
KINDS = ("numpy", "uint16", "grey", "alpha", "float", "PIL", "tensor", "tensor there")
BATCHES = {"12 MP": 16, "256": 800}
FRAMES = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["images", "batches", "video", "start"])
    parser.add_argument("--name", default="serpent_l.photo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--against", help="A commit, or a folder with another tree's src.")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeats", type=int, default=5, help="Rounds of images; folders and starts take fewer.")
    parser.add_argument("--images", type=int, help="Images of a folder, instead of 16 large and 800 small ones.")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _serve(args.name, args.device)  # of the tree that `_PRELUDE` chose
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees: dict[str, Path | None] = {"ours": None}
        if args.against:
            trees["against"] = _tree(args.against, folder)
        record: dict[str, Any] = {"name": args.name, "against": args.against, "cores": os.cpu_count()}
        if "images" in args.parts:
            workers = {tree: stack.enter_context(Worker(path, args.name, args.device)) for tree, path in trees.items()}
            record |= workers["ours"].ask("machine")
            record["images"] = _images(workers, args)
            record["phases"] = [{"size": size, **workers["ours"].ask("phases", size)} for size in args.sizes]
            _save(record, args.out)
            for worker in workers.values():  # so that the commands have the machine for themselves
                worker.close()
        for part, measure in (("batches", _batches), ("video", _video), ("start", _start)):
            if part in args.parts:
                record[part] = measure(trees, folder, args)
                _save(record, args.out)


def _save(record: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def _tell(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def _tree(against: str, folder: Path) -> Path:
    """The src of another tree: of a folder, or of a commit, with this tree's weights."""
    if Path(against).is_dir():
        return Path(against).resolve() / "src"
    here = Path(__file__).resolve().parents[1]
    data = subprocess.run(["git", "archive", against, "src"], cwd=here, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        archive.extractall(folder / "against", filter="data")
    if not cpu.unavailable():  # the C library is no part of a commit
        shutil.copy(cpu.library_file(), folder / "against/src/serpent_ir/ops/cpu")
    return folder / "against" / "src"


# Images: each tree answers in a process of its own


class Worker:
    """A process with a tree's package, which measures what it is asked."""

    def __init__(self, tree: Path | None, name: str, device: str):
        call = _python(tree, _WORK, __file__, "--worker", "--name", name, "--device", device)
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, *question: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that was asked for {question} ended")
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.wait()


def _images(workers: dict[str, Worker], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in args.sizes:
        network: list[float] = []
        for kind in ("network", *args.kinds):
            times: dict[str, list[float]] = {tree: [] for tree in workers}
            for _ in range(args.repeats):
                for tree, worker in workers.items():
                    times[tree] += worker.ask("call", size, kind)
            ms = {tree: statistics.median(taken) for tree, taken in times.items()}
            network = network or [ms["ours"]]
            ratios = {f"{tree} / network": taken / network[0] for tree, taken in ms.items()}
            rows.append(_tell({"size": size, "kind": kind, **ms, **ratios}))
    return rows


def _serve(name: str, device: str) -> None:
    asked: dict[str, Any] = {"machine": _machine, "call": _call, "phases": _phases}
    lines, answers = iter(sys.stdin.readline, ""), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    state = _State(name, device)
    for line in lines:
        what, *rest = json.loads(line)
        answers.write(json.dumps(asked[what](state, *rest)) + "\n")
        answers.flush()


class _State:
    def __init__(self, name: str, device: str):
        from serpent_ir import Restorer

        self.restorer = Restorer(name, device=device)
        self.device = next(self.restorer.model.parameters()).device
        self.inputs: dict[tuple[str, str], Callable[[], Any]] = {}

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any], times: int) -> list[float]:
        taken = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(1e3 * (time.perf_counter() - start))
        return taken


def _machine(state: _State) -> dict[str, Any]:
    from timing import machine

    return machine(str(state.device))


def _call(state: _State, size: str, kind: str) -> list[float]:
    """Milliseconds of some calls."""
    first = (size, kind) not in state.inputs
    call = state.inputs.setdefault((size, kind), _caller(state, size, kind))
    if first:
        for _ in range(2 if state.device.type == "cuda" else 1):  # the second one may capture a graph
            call()
    return state.ms(call, 20 if SIZES[size][0] < 1000 and state.device.type == "cuda" else 1)


def _caller(state: _State, size: str, kind: str) -> Callable[[], Any]:
    import torch
    from PIL import Image

    pixels = drawn(*SIZES[size])
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if kind == "network":
        x, model = (tensor[None] / 255).to(state.device), state.restorer.model.eval()
        return lambda: _plain_call(model, x)
    image: Any = {
        "numpy": lambda: pixels,
        "uint16": lambda: pixels.astype("uint16") * 257,
        "grey": lambda: pixels[..., 0].copy(),
        "float": lambda: pixels.astype("float32") / 255,
        "alpha": lambda: Image.merge("RGBA", (*Image.fromarray(pixels).split(), Image.fromarray(pixels[..., 1] // 9))),
        "PIL": lambda: Image.fromarray(pixels),
        "tensor": lambda: tensor,
        "tensor there": lambda: tensor.to(state.device),
    }[kind]()
    return lambda: state.restorer(image)


def _plain_call(model: Any, x: Any) -> Any:
    import torch

    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        return model(x)


def _phases(state: _State, size: str) -> dict[str, float]:
    """Milliseconds of what every restored JPEG goes through, each alone."""
    import torch

    from serpent_ir.image import Picture, read_image, write_image
    from serpent_ir.image.tensors import as_floats, as_samples
    from serpent_ir.system.transfers import download, upload

    pixels = drawn(*SIZES[size])
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "image.jpg"), Picture(pixels, format="JPEG")
        write_image(file, picture)
        x = as_floats(upload(pixels, state.device))[None]
        samples = as_samples(x.clone(), torch.uint8)
        calls: dict[str, Callable[[], Any]] = {
            "decode": lambda: read_image(file),
            "upload": lambda: upload(pixels, state.device),
            "to floats": lambda: as_floats(samples),
            "network": lambda: _plain_call(state.restorer.model.eval(), x),
            "to samples": lambda: as_samples(x.clone(), torch.uint8),
            "download": lambda: download(samples),
            "encode": lambda: write_image(file, picture),
        }
        times = {}
        for phase, call in calls.items():
            call()
            times[phase] = statistics.median(state.ms(call, 5))
    return _tell({"size": size, **times})


@functools.cache
def drawn(height: int, width: int, seed: int = 0) -> Any:
    """A photograph that scikit-image ships, enlarged, with some noise: (height, width, 3) uint8."""
    import numpy as np
    from PIL import Image
    from skimage import data

    photo = np.asarray(Image.fromarray(data.astronaut()).resize((width, height)), np.int16)
    noise = np.random.default_rng(seed).integers(-6, 7, photo.shape, np.int16)
    return np.clip(photo + noise, 0, 255).astype(np.uint8)


# Folders, videos and the start: the command, tree after tree


def _command(tree: Path | None, *words: object) -> tuple[float, float, str, str]:
    """Seconds, peak GB of main memory, and what the command printed and said."""
    start = time.perf_counter()
    done = subprocess.run(_python(tree, _RUN, *words), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr[-2000:]}")
    said, _, peak = done.stderr.strip().rpartition("\n")
    return seconds, float(peak) / 1e6, done.stdout, said


# An editable installation is found before any folder of the path.
_PRELUDE = """
import sys
if tree := sys.argv.pop(1):
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, tree)
"""


def _python(tree: Path | None, code: str, *words: object) -> list[str]:
    """A call of Python in which the package is that of a tree; None is the one that is installed."""
    return [sys.executable, "-c", _PRELUDE + code, str(tree or ""), *map(str, words)]


_WORK = """
import os, runpy
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Like the console script. Its last line is the peak of resident memory in KB.
_RUN = """
import atexit, resource
sys.argv[0] = "serpent"
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr, flush=True))
from serpent_ir.__main__ import main
main()
"""


def _batches(trees: dict[str, Path | None], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    from PIL import Image

    rows = []
    for size in (size for size in args.sizes if size in BATCHES):
        count = args.images or BATCHES[size]
        images = folder / f"images {size}"
        images.mkdir()
        for index in range(count):
            Image.fromarray(drawn(*SIZES[size], seed=index)).save(images / f"{index:03}.jpg", quality=92)
        row: dict[str, Any] = {"size": size, "images": count}
        for tree, path in trees.items():
            made = folder / f"{tree} {size}"
            words = ("restore", images, "-o", made, "-n", args.name, "--device", args.device, "--json")
            begun = time.time()
            seconds, gb, _, _ = _command(path, *words)
            written = sorted(file.stat().st_mtime for file in made.iterdir())
            first = count // 4
            rate = (count - first) / (written[-1] - written[first - 1])
            row |= {f"{tree} images a second": rate, f"{tree} first after s": written[0] - begun}
            row |= {f"{tree} s": seconds, f"{tree} GB": gb}
            shutil.rmtree(made)
        rows.append(_tell(row))
        shutil.rmtree(images)
    return rows


def _video(trees: dict[str, Path | None], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        import av
    except ModuleNotFoundError:
        return []
    height, width = SIZES["1080p"]
    film = folder / "film.mp4"
    frames = [av.VideoFrame.from_ndarray(drawn(height, width, seed), format="rgb24") for seed in range(8)]
    with av.open(str(film), "w") as made:
        stream = made.add_stream("libx264", rate=25, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(args.frames):
            made.mux(stream.encode(frames[index % 8].reformat(format="yuv420p")))
        made.mux(stream.encode())
    row: dict[str, Any] = {"size": "1080p", "frames": args.frames, **_codec_rates(film, folder, args.frames)}
    for tree, path in trees.items():
        target = folder / f"{tree}.mp4"
        words = ("video", film, "-o", target, "-n", args.name, "--device", args.device)
        _, gb, _, said = _command(path, *words)
        (after,) = re.findall(r"frames, ([\d.]+) s", said)
        row |= {f"{tree} frames a second": args.frames / float(after), f"{tree} GB": gb}
    return [_tell(row)]


def _codec_rates(film: Path, folder: Path, count: int) -> dict[str, float]:
    """Frames a second that the decoder and the encoder with the command's settings reach by themselves."""
    import av

    from serpent_ir.files.video_frames import ENCODERS

    with av.open(str(film)) as file:
        file.streams.video[0].thread_type = "AUTO"
        start = time.perf_counter()
        frames = list(file.decode(video=0))
        decoding = count / (time.perf_counter() - start)
    encoder = ENCODERS["mp4"][0]
    with av.open(str(folder / "encoded.mp4"), "w") as made:
        stream = made.add_stream(encoder.name, rate=25, options=dict(encoder.options))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        start = time.perf_counter()
        for frame in frames:
            frame.pict_type = 0
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
        encoding = count / (time.perf_counter() - start)
    return {"decoder frames a second": decoding, "encoder frames a second": encoding}


def _start(trees: dict[str, Path | None], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of `serpent restore` of one small image from the command to the file, with a warm disk."""
    from PIL import Image

    image = folder / "small.png"
    Image.fromarray(drawn(*SIZES["256"])).save(image)
    times: dict[str, list[float]] = {"python": [], "import torch": [], **{tree: [] for tree in trees}}
    for _ in range(1 + min(5, args.repeats)):  # the first one warms up
        for what, code in (("python", "pass"), ("import torch", "import torch")):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[what].append(time.perf_counter() - start)
        for tree, path in trees.items():
            words = ("restore", image, "-o", folder / "made.png", "-n", args.name, "--device", args.device)
            times[tree].append(_command(path, *words)[0])
    return [_tell({what: statistics.median(taken[1:]) for what, taken in times.items()})]


if __name__ == "__main__":
    main()
