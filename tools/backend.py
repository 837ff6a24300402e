"""scikit-build-core, which additionally requires a C compiler from PyPI if the system has none."""

import os
import platform
import shutil

from scikit_build_core import build as _scikit
from scikit_build_core.build import build_editable as build_editable
from scikit_build_core.build import build_sdist as build_sdist
from scikit_build_core.build import build_wheel as build_wheel
from scikit_build_core.build import get_requires_for_build_sdist as get_requires_for_build_sdist

ZIG = "ziglang>=0.13"
"""The zig compiler, which also compiles C. It takes some 100 MB, only in the environment of the build."""
_MACHINES = {"x86_64", "amd64", "aarch64", "arm64"}  # machines that tools/zig_library.py can compile for


def _compiler() -> list[str]:
    found = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang", "cl")))
    return [] if found or platform.machine().lower() not in _MACHINES else [ZIG]


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """What a build needs besides pyproject.toml's requirements."""
    return [*_scikit.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    """The same for `pip install -e`."""
    return [*_scikit.get_requires_for_build_editable(config_settings), *_compiler()]
