"""The command `serpent env`: prints what a bug report needs."""

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from serpent_ir import __version__
from serpent_ir.cli.shell import Json, shell_command

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "SERPENT_CPU_LEVEL",
    "TRITON_INTERPRET",
)
"""Environment variables that change how the package runs."""


@shell_command("Print what a bug report needs: versions, devices, the backend that serves each device, and why.")
def env(as_json: Json = False) -> None:
    """Print what decides, on this machine and in its packages, how serpent-ir runs. A home folder is shown as `~`.

    The JSON object holds: `serpent_ir`, `python`, `platform` and `torch`, strings; `packages`, name -> version, null
    if not installed; `devices`, a list of {name, product, backend, backends}, where `backends` maps each backend to
    the reason why it cannot serve, "" if it can; `cpu_library`, {level, levels, file}, null without the library;
    `threads`; `cache`, {folder, bytes}; `variables`.
    """
    import torch

    from serpent_ir.inference import available_devices

    told = {
        "serpent_ir": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'}",
        "packages": _packages(),
        "devices": [_device(name) for name in available_devices()],
        "cpu_library": _cpu_library(),
        "threads": torch.get_num_threads(),
        "cache": _cache(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if as_json:
        print(json.dumps(told))
        return
    for key in ("serpent_ir", "python", "platform", "torch"):
        print(f"{key.replace('_', '-')}: {told[key]}")
    print("packages:", ", ".join(f"{name} {version or '-'}" for name, version in told["packages"].items()))
    for device in told["devices"]:
        print(f"{device['name']} ({device['product']}): the scan runs by {device['backend']}")
        for backend, reason in device["backends"].items():
            print(f"  {backend}: {reason or 'can serve'}")
    library, cache = told["cpu_library"], told["cache"]
    if library:
        print(f"C library: {library['level']} of {', '.join(library['levels'])}; {library['file']}")
    print(f"threads: {told['threads']}")
    print(f"cache: {cache['folder'] or 'none: no home folder'}, {cache['bytes'] / 1e6:.1f} MB")
    print("variables:", ", ".join(f"{name}={value}" for name, value in told["variables"].items()) or "none that matter")


def _packages() -> dict[str, str | None]:
    """Versions of the packages in the requirements, in their order, with extras but without developers' tools."""
    names: dict[str, str | None] = {}
    try:
        requirements = importlib.metadata.requires("serpent-ir") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        requirements = ["torch", "numpy", "pillow"]
    for requirement in requirements:
        if (name := re.match(r"[\w.-]+", requirement)) and not re.search(r"extra == .(dev|wheels|docs)", requirement):
            names.setdefault(name.group().lower())
    names.pop("serpent-ir", None)
    names.setdefault("triton")
    for name in names:
        try:
            names[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return names


def _device(name: str) -> dict[str, Any]:
    import torch

    from serpent_ir.ops import BACKENDS, default_backend, why_not
    from serpent_ir.system.devices import device_name

    device = torch.device(name)
    product = platform.processor() or platform.machine() if device.type == "cpu" else device_name(device)
    backends = {backend: why_not(backend, device) for backend in BACKENDS}
    return {"name": name, "product": product, "backend": default_backend(device), "backends": backends}


def _cpu_library() -> dict[str, Any] | None:
    from serpent_ir.ops import cpu

    if cpu.unavailable():
        return None
    return {"level": cpu.level(), "levels": cpu.levels(), "file": _short(cpu.library_file())}


def _cache() -> dict[str, Any]:
    from serpent_ir.ops.cuda.nvrtc import cache_folder

    folder = cache_folder()
    files = [file for file in folder.rglob("*") if file.is_file()] if folder and folder.is_dir() else []
    return {"folder": folder and _short(folder), "bytes": sum(file.stat().st_size for file in files)}


def _short(path: Path) -> str:
    """A path without the name of the person whose home folder it lies in."""
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home() raises if there is no home; this does not
    text = str(path)
    return "~" + text[len(home) :] if home not in ("~", os.sep) and text.startswith(home + os.sep) else text
