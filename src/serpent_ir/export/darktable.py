"""Packages for darktable's neural restore: a ZIP file of one folder with config.json and model.onnx.

Facts from darktable's sources (src/ai/README.md, src/ai/backend_common.c, src/common/ai/restore.c and
src/common/ai_models.c): the file ends in .dtmodel. Its first entry lies in a folder whose name is the model's `id`. Ids
are `<task>-<model>`, in lower case. The task "denoise" takes one image (1, 3, H, W), float32, RGB in [0, 1], encoded as
sRGB, in tiles that overlap by 64 px, and loads model.onnx unless it is told another name.
"""

import io
import json
import zipfile
from pathlib import Path

from torch import nn

from serpent_ir.errors import UsageError
from serpent_ir.export import Check, export_network
from serpent_ir.models import licence_of
from serpent_ir.models.weights import FREE_WEIGHTS
from serpent_ir.models.wrappers import network_of

SIDE = 768
"""Pixels of a side of the tiles that darktable gives a model of fixed size."""
WORK = {"photo": "noise, blur and JPEG of photos", "denoise": "noise"}
"""What weights for a task take away, of those tasks that keep an image's size and that a photo from a camera needs."""


def export_for_darktable(name: str, model: nn.Module, output: Path) -> tuple[dict[str, str], list[Check]]:
    """Write the network of the weights called `name` as a .dtmodel file; see `export_network`.

    Raises:
        UsageError: the weights have no free licence, or do another work than to clean an image at its size.
        SerpentError: as `export_network`.
    """
    serving = ", ".join(sorted(weights for weights in FREE_WEIGHTS if weights.partition(".")[2] in WORK))
    if name not in FREE_WEIGHTS:
        raise UsageError(
            f"a darktable package needs weights with a free licence ({serving}); {name}: {licence_of(name)}"
        )
    config = network_of(model).config
    work = WORK.get(str(getattr(config, "task", "")))
    if work is None:
        raise UsageError(f"{name}: darktable's denoising takes noise from a photo of any size; it can have {serving}")
    if output.suffix.lower() != ".dtmodel":
        raise UsageError(f"{output}: a darktable package ends in .dtmodel")
    identity = "denoise-" + name.replace("_", "-").replace(".", "-")
    told = {
        "id": identity,
        "name": name.replace("_", " ").replace(".", " "),
        "description": f"Serpent: {work} ({FREE_WEIGHTS[name]})",
        "task": "denoise",
        "version": "1.0",
        "backend": "onnx",
        "num_inputs": 1,
        "tiling": True,
    }

    def package(content: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in {"config.json": json.dumps(told, indent=2).encode(), "model.onnx": content}.items():
                # A date of its own would make two exports of the same network different files.
                archive.writestr(zipfile.ZipInfo(f"{identity}/{file}"), data, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    more = {"network": name.partition(".")[0], "weights_licence": FREE_WEIGHTS[name]}
    return export_network(model, output, size=SIDE, told=more, package=package)
