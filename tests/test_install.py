"""Building the package from source, with a C compiler and without one. Tests of the library are in ops/test_cpu.py."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "serpent_ir/ops/cpu/libserpent_scan"
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


def test_without_any_compiler_the_package_is_built_without_its_library(tmp_path, build_tools):
    hidden = {"PATH": without_a_compiler(tmp_path, build_tools), "CC": "/nonexistent", "CXX": "/nonexistent"}
    no_zig = tmp_path / "no_zig" / "ziglang.py"
    no_zig.parent.mkdir()
    no_zig.write_text("raise ImportError")
    hidden["PYTHONPATH"] = str(no_zig.parent)
    names = names_in(build_wheel(tmp_path, os.environ | hidden))
    assert not [name for name in names if name.startswith(LIBRARY)]
    assert names >= EVERYWHERE


@pytest.mark.slow  # `make test` installs the package by this compiler
def test_with_a_compiler_one_wheel_holds_the_library_for_every_python(tmp_path, build_tools):
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    built = build_wheel(tmp_path, dict(os.environ))
    assert "-py3-none-" in built.name
    names = names_in(built)
    assert [name for name in names if name.startswith(LIBRARY)]
    assert not [name for name in names if name.endswith((".c", ".h")) or Path(name).name.startswith("test_")]
    assert names >= EVERYWHERE


def without_a_compiler(tmp_path: Path, build_tools: list[str]) -> str:
    """A PATH with the tools of a build and nothing else."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in build_tools:
        (path / Path(tool).name).symlink_to(tool)
    return str(path)


# What begins a library for a platform, and where in it the machine stands: ELF, Mach-O, Windows' PE.
MADE_FOR = {
    "manylinux_2_17_x86_64": (b"\x7fELF\x02", 18, 62),
    "manylinux_2_17_aarch64": (b"\x7fELF\x02", 18, 183),
    "macosx_11_0_arm64": (b"\xcf\xfa\xed\xfe", 4, 0x0C),
    "macosx_10_15_x86_64": (b"\xcf\xfa\xed\xfe", 4, 0x07),
    "win_amd64": (b"MZ", None, 0x8664),
}
PLATFORMS = [*list(MADE_FOR)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(MADE_FOR)[1:])]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_wheel_for_each_platform_is_made_here_without_a_compiler(tmp_path, build_tools, platform):
    pytest.importorskip("ziglang", reason="the C compiler of PyPI: pip install -e '.[dev]'")
    environment = os.environ | {"PATH": without_a_compiler(tmp_path, build_tools), "CC": "/nonexistent"}
    environment |= {
        "PYTHONPATH": str(ROOT / "tools"),
        "PIP_NO_BUILD_ISOLATION": "false",
    }  # pip's word for: no isolation
    made = subprocess.run(
        [sys.executable, "-m", "wheels", str(tmp_path / "dist"), platform],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert names_in(wheel) >= EVERYWHERE
    with zipfile.ZipFile(wheel) as opened:
        (library,) = [opened.read(name) for name in opened.namelist() if name.startswith(LIBRARY)]
        opened.extractall(tmp_path / "site")
    magic, place, machine = MADE_FOR[platform]
    if place is None:  # a PE's header stands where its first one says
        place = int.from_bytes(library[60:64], "little") + 4
    assert library.startswith(magic)
    assert int.from_bytes(library[place : place + 2], "little") == machine
    assert b"serpent_scan_" in library
    if platform == f"manylinux_2_17_{os.uname().machine}":
        restores(tmp_path / "site")


def restores(site: Path) -> None:
    """The wheel's own library computes the scan, in a process that has no other."""
    code = """if True:
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # the editable install
        import torch, serpent_ir
        from serpent_ir.ops import cpu, ss2d; import os
        assert serpent_ir.__file__.startswith(sys.argv[1]), serpent_ir.__file__
        from scan_inputs import make_inputs
        tensors = make_inputs(2, 7, 9, 20, 6, 2)
        want = ss2d(*[t.double() for t in tensors], backend="reference")
        assert len(cpu.levels()) > 1 or os.uname().machine != "x86_64", cpu.levels()
        got = ss2d(*tensors, backend="cpu")
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    """
    environment = {"PYTHONPATH": f"{site}{os.pathsep}{ROOT / 'tests' / 'ops'}", "PATH": "/nonexistent"}
    ran = subprocess.run([sys.executable, "-c", code, str(site)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_a_compiler_is_asked_for_only_where_there_is_none(monkeypatch, tmp_path, build_tools):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delenv("CC", raising=False)
    import backend

    asked = [backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable]
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        assert not [one for ask in asked for one in ask() if "ziglang" in one]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert all(backend.ZIG in ask() for ask in asked)
    monkeypatch.setattr(backend.platform, "machine", lambda: "s390x")  # where tools/zig_library.py has no target
    assert not [one for ask in asked for one in ask() if "ziglang" in one]
