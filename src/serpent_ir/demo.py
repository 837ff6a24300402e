"""A web page on this machine: drop a photo, see it before and after, download what the command would have written.

Images are restored in a separate process, so that one that takes too long can be stopped. Uploads and results live in a
temporary folder that is removed with the server. No other file can be read through the page.
"""

import functools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serpent_ir.degradations import create_degradation, evaluation_generator
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.files.source import read_mask
from serpent_ir.image import WRITTEN_SUFFIXES, Picture, read_image, to_pixels, to_tensor, write_image
from serpent_ir.inference import Restorer
from serpent_ir.inference.blending import STRENGTHS
from serpent_ir.inference.reblending import Restoration
from serpent_ir.metrics import psnr
from serpent_ir.models import DEFAULT_WEIGHTS, list_models
from serpent_ir.system.file_state import FileState
from serpent_ir.system.whole_file import temporary_folder
from serpent_ir.system.worker import Worker

PREVIEW = 1600
"""Longest side, in pixels, of the preview on the page. The download has all pixels."""
QUEUE = 8
"""How many people may wait. Anyone beyond that is asked to come back later."""
TASKS = {
    "photo": "An everyday photo: a little blurred, noisy or compressed",
    "deblur": "Blurred: out of focus, a standard deviation of 3 pixels, with noise",
    "sr8": "Small: make it 8 times larger",
    "photo_x4": "Small and not quite clean: make it 4 times larger",
    "photo_x2": "Small and not quite clean: make it twice as large",
    "sr4": "Small and clean: make it 4 times larger",
    "sr2": "Small and clean: make it twice as large",
    "denoise": "Noisy",
    "jpeg": "JPEG artefacts",
}
"""What the page says about a task. Inpainting is missing because it needs a mask, which the page has no way to give."""


@dataclass(frozen=True)
class Limits:
    """What one image may cost."""

    megapixels: float = 16.0  # of the restored image
    seconds: float = 120.0
    megabytes: int = 64  # of the uploaded file


@dataclass(frozen=True)
class Result:
    """What the page shows for one image, and the file to download."""

    before: Image.Image
    after: Image.Image
    file: Path
    told: str


def serve(*, host: str = "127.0.0.1", port: int = 7860, device: str = "auto", limits: Limits | None = None) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UsageError: gradio is missing, or there is no such device.
        SerpentError: the port is in use.
    """
    if ":" in host:
        raise UsageError(f"--host {host}: gradio serves no IPv6 address; give one of IPv4, or a name")
    limits = limits or Limits()
    with _without_proxies():
        _gradio()  # imported before there is a folder, which Ctrl-C during the import would leave behind
    with temporary_folder("demo") as folder:
        cache = folder / "cache"
        cache.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(cache)  # gradio serves what is in there and nothing else
        _gradio().routes.DEFAULT_TEMP_DIR = str(cache)  # as it was when gradio was imported; a folder is made there
        worker = Worker()
        try:
            with _without_proxies():
                page = build_page(cache, worker, device, limits)
                page.queue(max_size=QUEUE, default_concurrency_limit=1)
                page.launch(
                    server_name=host,
                    server_port=port,
                    share=False,
                    allowed_paths=[str(cache)],  # or uploads named `.png` fail where the current folder is above it
                    max_file_size=limits.megabytes * 1_000_000,
                    ssr_mode=False,
                    footer_links=[],
                    quiet=True,
                    prevent_thread_lock=True,
                )
            print(f"serpent: the page is at http://{host}:{port}", flush=True)
            page.block_thread()
        except OSError as error:
            reason = str(error).partition(". ")[0]  # gradio continues with advice on its own settings
            raise SerpentError(f"{host}:{port}: cannot be served ({reason}); choose another --port or --host") from None
        finally:
            worker.stop()


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError:
        raise UsageError("the page needs gradio: pip install 'serpent-ir[demo]'") from None
    return gradio


@contextmanager
def _without_proxies() -> Iterator[None]:
    """Remove proxies from the environment.

    gradio asks its own address, through httpx, whether it is there. httpx would ask a proxy that does not know this
    machine, or for whose protocol a package is missing.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)


def build_page(folder: Path, worker: Worker, device: str, limits: Limits) -> Any:
    """The page, a gradio.Blocks. `folder` is for the files that it serves."""
    gr = _gradio()
    weights = [name for name in list_models(pretrained=True) if name.partition(".")[2] in TASKS]
    tasks = {task: text for task, text in TASKS.items() if any(name.endswith(f".{task}") for name in weights)}
    samples = make_samples(folder / "samples", set(tasks))

    def networks(task: str) -> list[str]:
        """The networks with weights for a task; the one that the command takes comes first."""
        usual = DEFAULT_WEIGHTS.partition(".")[0]
        return sorted(
            (name.partition(".")[0] for name in weights if name.endswith(f".{task}")), key=lambda name: name != usual
        )

    def answer(function: Callable[..., Result], path: str | None, *args: Any, **options: Any) -> Any:
        if not path:
            raise gr.Error("Choose a photo first.", print_exception=False)
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            call = functools.partial(function, **options)
            result = worker(call, Path(path), place, *args, device, limits, seconds=limits.seconds)
        except SerpentError as error:
            shutil.rmtree(place)
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        return (result.before, result.after), str(result.file), result.told

    def choices() -> tuple[Any, Any]:
        first = next(iter(tasks))
        task = gr.Radio([(text, task) for task, text in tasks.items()], value=first, label="What is wrong with it")
        network = gr.Dropdown(networks(first), value=networks(first)[0], label="Network")
        task.change(
            lambda task: gr.Dropdown(networks(task), value=networks(task)[0]), task, network, api_visibility="private"
        )
        return task, network

    def outputs() -> list[Any]:
        slider = gr.ImageSlider(label="Before and after", type="pil", interactive=False, format="png")
        told = gr.Markdown(elem_classes="told")
        file = gr.File(label="Download, with all pixels and metadata", interactive=False, elem_classes="result")
        return [slider, file, told]

    def restored(strength: float, path: str | None, task: str, network: str, protect: str | None) -> Any:
        asked = path, task, network, protect
        mask = Path(protect) if protect else None
        shown = answer(restore_upload, path, task, network, strength=strength, protect=mask)
        return *shown, gr.Slider(value=strength, visible=True), asked

    def clear_with(photo: Any, shown: list[Any]) -> None:
        """Clear the result when its photo changes.

        Beside the next photo, or its error, it would pass for that photo's.
        """
        photo.change(lambda: (None, None, ""), None, shown, show_progress="hidden", api_visibility="private")

    kinds = ["image", ".tif", ".tiff", ".avif", ".heic", ".heif"]
    with gr.Blocks(title="serpent", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# serpent\nRestores photos on this machine; nothing leaves it. Up to {limits.megapixels:g} megapixels "
            f"and {limits.seconds:g} seconds an image."
        )
        with gr.Tab("Restore"), gr.Row():
            with gr.Column():
                photo = _of_any_name(gr.File(label="A photo", file_types=kinds, elem_classes="photo"))
                task, network = choices()
                protect = _of_any_name(
                    gr.File(
                        label="What stays as it is: an image, white there", file_types=kinds, elem_classes="protect"
                    )
                )
                start = gr.Button("Restore", variant="primary")
                if samples:
                    gr.Examples(
                        [[str(file), name] for file, name in samples.items()], [photo, task], cache_examples=False
                    )
            with gr.Column():
                shown = outputs()
                strength = gr.Slider(
                    *STRENGTHS, 1.0, step=0.05, label="Strength", visible=False, elem_classes="strength"
                )
                asked = gr.State((None, "", "", None))  # what the result on the page was made of
        clear_with(photo, shown)
        photo.change(lambda: gr.Slider(visible=False), None, strength, show_progress="hidden", api_visibility="private")
        shown = [*shown, strength, asked]
        start.click(
            lambda *args: restored(1.0, *args), [photo, task, network, protect], shown, api_visibility="private"
        )
        # The network does not run again: `restore_upload` has kept what it made.
        strength.release(
            lambda strength, asked: restored(strength, *asked), [strength, asked], shown, api_visibility="private"
        )
        with gr.Tab("Degrade and restore"), gr.Row():
            with gr.Column():
                gr.Markdown("Does to a clean photo what the weights undo, undoes it, and measures how well.")
                clean = _of_any_name(gr.File(label="A clean photo", file_types=kinds, elem_classes="clean"))
                task_2, network_2 = choices()
                seed = gr.Number(0, label="Seed of what is random", precision=0, minimum=0, maximum=2**31)
                start_2 = gr.Button("Degrade and restore", variant="primary")
            with gr.Column():
                shown_2 = outputs()
        clear_with(clean, shown_2)
        start_2.click(
            lambda *args: answer(degrade_and_restore, *args),
            [clean, task_2, network_2, seed],
            shown_2,
            api_visibility="private",
        )
    return page


def _of_any_name(file: Any) -> Any:
    """Accept any file name. gradio goes by the name and refuses `.png`; `read_image` decides by the content."""
    file.preprocess = lambda given: given.path if given else None
    return file


def restore_upload(
    path: Path,
    folder: Path,
    task: str,
    network: str,
    device: str,
    limits: Limits,
    *,
    strength: float = 1.0,
    protect: Path | None = None,
) -> Result:
    """Restore an uploaded file into `folder`. The result is the file that `serpent restore` writes.

    At another strength, or with other pixels protected, the last images are only blended anew: to a level of 16 bits
    what the command would write.
    """
    name = f"{network}.{task}"
    restoration, notes, seconds = _restoration(path, FileState.of(path), name, device, limits)
    try:
        mask = read_mask(protect)
    except ImageError as error:  # hides the server's paths
        raise ImageError(str(error).replace(f"{protect}: ", f"{protect.name}: ") if protect else str(error)) from None
    restored = restoration.at(strength, mask)
    stem, suffix = _name_of(path)
    file = folder / f"{stem}-restored{suffix if suffix in WRITTEN_SUFFIXES else '.png'}"
    with _noted() as more:
        write_image(file, restored)
    height, width = restored.pixels.shape[:2]
    told = f"{width}x{height} pixels in {seconds:.1f} s by {name}"
    told += f", at a strength of {strength:g}" if strength != 1 else ""
    if restoration.left == 1:
        told += ": nothing to mend, left as it was"
    for said in dict.fromkeys((*notes, *more)):  # each once
        told += f"\n\nNote: {said.removeprefix(f'{path}: ').removeprefix(f'{file}: ')}"
    return Result(_preview(restoration.given, restoration.scale), _preview(restored), file, told)


@functools.lru_cache(maxsize=2)
def _restoration(
    path: Path, state: FileState | None, name: str, device: str, limits: Limits
) -> tuple[Restoration, tuple[str, ...], float]:
    """What a network makes of a file, what is to be said of that, and the seconds that it took."""
    restorer = _restorer(name, device)
    with _noted() as notes:
        picture = _read(path, restorer.scale, limits)
        start = time.perf_counter()
        restoration = Restoration.of(restorer, picture)
    return restoration, tuple(notes), time.perf_counter() - start


@contextmanager
def _noted() -> Iterator[list[str]]:
    """What people are warned of inside; all of it is there at the end."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield said
    said += [str(warning.message) for warning in caught if warning.category is UserWarning]


def _name_of(path: Path) -> tuple[str, str]:
    """Stem and suffix of an uploaded file. Also for `.png` and `..png`, whose name is all suffix to people."""
    stem, dot, suffix = path.name.rpartition(".")
    return stem.strip(".") or "photo", f"{dot}{suffix}".lower() if dot else ""


def degrade_and_restore(
    path: Path, folder: Path, task: str, network: str, seed: float | None, device: str, limits: Limits
) -> Result:
    """Degrade an uploaded file as an evaluation does, restore it, and measure both against the original."""
    degradation = create_degradation(task)
    restorer = _restorer(f"{network}.{task}", device)
    clean = degradation.crop(to_tensor(_read(path, 1, limits).pixels))
    y = degradation(clean, generator=evaluation_generator(int(seed or 0), 0))
    start = time.perf_counter()
    restored = restorer(y)
    seconds = time.perf_counter() - start
    given = degradation.before(degradation.network_input(y))
    before, after = (psnr(image, clean).item() for image in (given, restored))
    file = folder / f"{_name_of(path)[0]}-restored.png"
    write_image(file, Picture(to_pixels(restored, np.uint8)))
    told = f"PSNR {before:.2f} dB before, {after:.2f} dB after; {seconds:.1f} s by {network}.{task}"
    shown = [_preview(Picture(to_pixels(image, np.uint8))) for image in (given, restored)]
    return Result(shown[0], shown[1], file, told)


def make_samples(folder: Path, tasks: set[str]) -> dict[Path, str]:
    """Degraded photos to try, and the task that undoes each. None if scikit-image's photos are not there."""
    try:
        from skimage import data
    except ModuleNotFoundError:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    samples = {}
    for name, task in (("astronaut", "deblur"), ("chelsea", "sr8"), ("coffee", "photo")):
        if task in tasks:
            degradation = create_degradation(task)
            clean = degradation.crop(to_tensor(np.asarray(getattr(data, name)())))
            file = folder / f"{name}-{task}.png"
            y = degradation(clean, generator=evaluation_generator(0, 0))
            write_image(file, Picture(to_pixels(y, np.uint8)))
            samples[file] = task
    return samples


@functools.lru_cache(maxsize=2)
def _restorer(name: str, device: str) -> Restorer:
    return Restorer(name, device=device)


def _read(path: Path, scale: int, limits: Limits) -> Picture:
    try:
        with Image.open(path) as image:  # reads the header only, before any memory is taken
            _check_size(path, *image.size, scale, limits)
    except SerpentError:
        raise
    except Exception:  # damaged, or unknown to Pillow: read_image says which
        pass
    picture = read_image(path)
    height, width = picture.pixels.shape[:2]
    _check_size(path, width, height, scale, limits)
    return picture


def _check_size(path: Path, width: int, height: int, scale: int, limits: Limits) -> None:
    if width * height * scale**2 > limits.megapixels * 1e6:
        times = f", {scale} times as wide and high when restored," if scale > 1 else ""
        raise ImageError(
            f"{path}: {width}x{height} px{times} is over this page's {limits.megapixels:g} megapixels; "
            "use a smaller one, or the command serpent restore"
        )


def _preview(picture: Picture, scale: int = 1) -> Image.Image:
    """At most `PREVIEW` px per side, 8 bits, opaque."""
    pixels = picture.pixels
    image = Image.fromarray((pixels // 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels)
    width, height = image.width * scale, image.height * scale
    shrunk = min(1.0, PREVIEW / max(width, height))
    size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
