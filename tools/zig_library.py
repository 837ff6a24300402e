"""Compiles the C library of the CPU scan with zig (PyPI's `ziglang`), for this machine or for another one.

    python tools/zig_library.py OUTPUT [TARGET]       a file to write, and a target of `zig targets`

CMakeLists.txt calls it if no C compiler is found, and tools/wheels.py calls it for other platforms. The flags are those
of CMakeLists.txt.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[1] / "src" / "serpent_ir" / "ops" / "cpu" / "csrc"
FLAGS = [
    "-O3",
    "-g0",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fno-sanitize=undefined",
]
X86_LEVELS = {
    "x86_64_v2": "-mssse3 -msse4.1 -msse4.2",
    "x86_64_v3": "-mavx2 -mfma",
    "x86_64_v4": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512",
}


def build(output: Path, target: str) -> None:
    """Write the library for `target`, for example `aarch64-linux-gnu.2.17`. Raises CalledProcessError if zig fails."""
    levels = {"generic": "", **(X86_LEVELS if target.startswith("x86_64") else {})}
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, *FLAGS]
    if target.startswith("x86_64"):
        compiler += ["-DSERPENT_X86_LEVELS"]
    if "windows" not in target:
        compiler += ["-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for name, flags in levels.items():
            objects.append(f"{folder}/{name}.o")
            source = str(CSRC / "kernels.c")
            subprocess.run([*compiler, f"-DLEVEL={name}", *flags.split(), "-c", source, "-o", objects[-1]], check=True)
        units = [str(CSRC / f"{name}.c") for name in ("driver", "parts", "sequence", "threads")]
        libraries = ["-lm", "-lpthread"] if "linux" in target else []
        subprocess.run([*compiler, "-shared", "-s", "-o", str(output), *units, *objects, *libraries], check=True)


def this_machine() -> str:
    """The target of this machine. On Linux with a C library that is old enough for all systems."""
    import platform

    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    system = {"linux": "linux-gnu.2.17", "darwin": "macos.11.0", "win32": "windows-gnu"}[sys.platform]
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        system = "linux-musl"
    return f"{machine}-{system}"


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else this_machine())
