"""Building the package from source, with a C compiler and without one. Tests of the library are in ops/test_cpu.py."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "serpent_ir/ops/libserpent_scan"
PACKAGE = ROOT / "src" / "serpent_ir"
WEIGHTS = {f"serpent_ir/weights/{path.name}" for path in (PACKAGE / "weights").iterdir()}
EVERYWHERE = WEIGHTS | {f"serpent_ir/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py*")}
EVERYWHERE = {name for name in EVERYWHERE if "__pycache__" not in name}  # with py.typed


def build_wheel(folder: Path, environment: dict[str, str]) -> Path:
    """A wheel of this checkout, made with the build tools that are installed; needs no network."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", f"--config-settings=build-dir={folder / 'build'}"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        *options,
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def build_tools() -> list[str]:
    pytest.importorskip("scikit_build_core", reason="builds without isolation: pip install -e '.[dev]'")
    pytest.importorskip("pip", reason="builds with pip")
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tools = [path for name in ("cmake", "ninja") if (path := shutil.which(name, path=here)) is not None]
    if len(tools) < 2 or sys.platform != "linux":
        pytest.skip("builds without isolation on Linux, so with cmake and ninja: pip install -e '.[dev]'")
    return tools


def test_without_a_compiler_the_package_is_built_without_its_library(tmp_path, build_tools):
    path = tmp_path / "bin"
    path.mkdir()
    for tool in build_tools:
        (path / Path(tool).name).symlink_to(tool)
    hidden = {"PATH": str(path), "CC": "/nonexistent", "CXX": "/nonexistent"}
    names = names_in(build_wheel(tmp_path, os.environ | hidden))
    assert not [name for name in names if name.startswith(LIBRARY)]
    assert names >= EVERYWHERE


def test_with_a_compiler_one_wheel_holds_the_library_for_every_python(tmp_path, build_tools):
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    built = build_wheel(tmp_path, dict(os.environ))
    assert "-py3-none-" in built.name
    names = names_in(built)
    assert [name for name in names if name.startswith(LIBRARY)]
    assert not [name for name in names if name.endswith((".c", ".h")) or Path(name).name.startswith("test_")]
    assert names >= EVERYWHERE


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())
