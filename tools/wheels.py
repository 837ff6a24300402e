"""Builds the wheels for all platforms on one machine, with zig as the C compiler: `make wheels`.

    python tools/wheels.py FOLDER [PLATFORM ...]

A wheel contains nothing that depends on Python's ABI, so one wheel serves every Python: py3-none-PLATFORM.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from zig_library import build

ROOT = Path(__file__).parents[1]
PLATFORMS = {  # wheel platform -> zig target and library suffix
    "manylinux_2_17_x86_64": ("x86_64-linux-gnu.2.17", "so"),
    "manylinux_2_17_aarch64": ("aarch64-linux-gnu.2.17", "so"),
    "macosx_11_0_arm64": ("aarch64-macos.11.0", "dylib"),
    "macosx_10_15_x86_64": ("x86_64-macos.10.15", "dylib"),
    "win_amd64": ("x86_64-windows-gnu", "dll"),
}


def make_wheel(platform: str, folder: Path) -> Path:
    """Build the wheel for a platform in `PLATFORMS` into the folder. Raises CalledProcessError if a tool fails."""
    target, ending = PLATFORMS[platform]
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, f"libserpent_scan.{ending}")
        build(library, target)
        options = ["--no-deps", f"--config-settings=cmake.define.SERPENT_LIBRARY={library}"]
        options.append(f"--config-settings=build-dir={scratch}/build")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", *options]
        subprocess.run([*pip, "-w", scratch, str(ROOT)], check=True)
        (made,) = Path(scratch).glob("*.whl")
        tags = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, str(made)]
        subprocess.run(tags, check=True, stdout=subprocess.DEVNULL)
        (made,) = Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(made, folder / made.name))


if __name__ == "__main__":
    for name in sys.argv[2:] or PLATFORMS:
        print(make_wheel(name, Path(sys.argv[1])), flush=True)
