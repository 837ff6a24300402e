"""Memory that is short: limits are seen, and where it ends a person reads one line that names the remedy."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import ENVIRONMENT, save_photo, serpent
from networks import identity_network
from serpent_ir import evaluate
from serpent_ir.errors import ImageError, SerpentError, is_out_of_memory, memory_line
from serpent_ir.image import Picture, read_image, write_image
from serpent_ir.inference import Restorer, footprint, restore, samples, tiling
from serpent_ir.inference import strip_restorer as inference
from serpent_ir.inference import whole_or_tiles as passes
from serpent_ir.system import memory

pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

MB = 1 << 20
BOTH = "0::/user.slice/job\n4:cpu:/\n9:memory:/slurm/uid_1/job_2\n"


def group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def escaped(path: Path) -> str:
    return str(path).replace(" ", "\\040")


def process(folder: Path, cgroup: str, *mounts: tuple[str, Path, str, str]) -> Path:
    """A process's folder of /proc; a mount is (root, mount point, type, options)."""
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(cgroup)
    lines = [
        f"{30 + i} 24 0:{26 + i} {root} {escaped(place)} rw,nosuid shared:{i} - {kind} cgroup {options}"
        for i, (root, place, kind, options) in enumerate(mounts)
    ]
    (folder / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "\n".join(lines) + "\n")
    return folder


def test_the_least_limit_of_all_groups_above_counts(tmp_path):
    """Version 2: Slurm's and systemd's limits stand somewhere between the root and the group of the process."""
    root = tmp_path / "cgroup v2"
    job = root / "system.slice" / "job_1"
    here = process(tmp_path / "proc", "0::/system.slice/job_1/step_0\n", ("/", root, "cgroup2", "rw"))
    assert memory.free_in_groups(here) == sys.maxsize  # no files: the controller is off
    group(job / "step_0", memory_max="max", memory_high="max", memory_current=1 * MB)
    group(root, cgroup_controllers="memory")  # the root has no limit
    assert memory.free_in_groups(here) == sys.maxsize
    group(job, memory_max=900 * MB, memory_current=200 * MB, memory_stat=f"anon 5\ninactive_file {50 * MB}")
    assert memory.free_in_groups(here) == 750 * MB
    group(root / "system.slice", memory_max="max", memory_high=600 * MB, memory_current=500 * MB)
    assert memory.free_in_groups(here) == 100 * MB
    group(job / "step_0", memory_max=40 * MB, memory_current=41 * MB)
    assert memory.free_in_groups(here) == 0
    (here / "cgroup").write_text("0::/another\n")
    assert memory.free_in_groups(here) == sys.maxsize


def test_limits_of_version_1_and_of_both_at_once(tmp_path):
    first, second = tmp_path / "memory", tmp_path / "unified"
    here = process(
        tmp_path / "proc",
        BOTH,
        ("/", tmp_path / "cpu", "cgroup", "rw,cpu,cpuacct"),
        ("/", first, "cgroup", "rw,memory"),
        ("/", second, "cgroup2", "rw"),
    )
    job = first / "slurm" / "uid_1" / "job_2"
    group(tmp_path / "cpu", memory_limit_in_bytes=1, memory_usage_in_bytes=0)  # not that controller's
    group(job, memory_limit_in_bytes=0x7FFFFFFFFFFFF000, memory_usage_in_bytes=3)
    assert memory.free_in_groups(here) > 1 << 60
    stat = f"inactive_file 7\ntotal_inactive_file {10 * MB}"
    group(job.parent, memory_limit_in_bytes=300 * MB, memory_usage_in_bytes=250 * MB, memory_stat=stat)
    assert memory.free_in_groups(here) == 60 * MB
    group(second / "user.slice", memory_max=20 * MB, memory_current=0)
    assert memory.free_in_groups(here) == 20 * MB


@pytest.mark.parametrize(("root", "own"), [("/docker/1a", "/docker/1a/sub"), ("/docker/1a", "/elsewhere"), ("/", "/")])
def test_limits_of_a_container(root, own, tmp_path):
    """Its own group is the root of what is mounted, whatever name it has on the host."""
    mount = tmp_path / "memory"
    here = process(tmp_path / "proc", f"3:memory:{own}\n", (root, mount, "cgroup", "rw,memory"))
    group(mount, memory_limit_in_bytes=100 * MB, memory_usage_in_bytes=30 * MB)
    assert memory.free_in_groups(here) == 70 * MB


def test_groups_that_nobody_tells_of(tmp_path):
    assert memory.free_in_groups(tmp_path / "none") == sys.maxsize
    assert memory.free_in_groups(process(tmp_path / "proc", "", ("/", tmp_path, "cgroup2", "rw"))) == sys.maxsize


ULIMIT = """
import resource
from serpent_ir.system import memory
print(memory.host_available() >> 20)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20),) * 2)
print(memory.host_available() >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_limit_of_a_process_counts():
    done = subprocess.run([sys.executable, "-c", ULIMIT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < after <= 100 < before


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (MemoryError("Cannot allocate memory (os error 12)"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 7861048 bytes from file </w>: Cannot allocate memory (12)"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (cv2.error("OpenCV(4.9.0) error: (-4:Insufficient memory) Failed to allocate 9000000 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ImportError("No module named 'av'"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), False),
        (ValueError("not enough memory"), False),
        (SerpentError("weights.pth: not enough memory"), False),
    ],
)
def test_the_ways_in_which_memory_ends(error, short):
    assert is_out_of_memory(error) == short
    line = memory_line(error)
    assert "\n" not in line
    assert line.startswith("not enough memory (")
    assert "ulimit -v" in line
    wrapped = ImportError("numpy could not be imported, and here are forty lines of advice")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == short


def test_the_reason_is_the_line_that_says_it():
    long = ImportError("\n\nPLEASE READ THIS\nOriginal error was: libx.so: failed to map segment. More.\n")
    assert "(Original error was: libx.so: failed to map segment)" in memory_line(long)


def ends(*_: object, **__: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")


PLACES: dict[str, tuple[object, str, Callable[..., object]]] = {
    "blending": (tiling.Axis, "weights", ends),
    "to tensor": (samples, "to_tensor", ends),
    "to pixels": (inference, "integers", ends),
    "upsampling": (passes, "network_block", ends),
    "joining": (torch, "cat", ends),
    "transparency": (inference, "fill_transparent", ends),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_ends_around_the_network(place, monkeypatch):
    restorer = Restorer(identity_network(), tile=64)
    pixels = np.zeros((90, 100, 4), np.uint8)
    image = torch.zeros(3, 90, 100) if place == "joining" else Image.fromarray(pixels)
    monkeypatch.setattr(*PLACES[place])
    with pytest.raises(SerpentError, match=r"^not enough memory on cpu for an image of \d+x\d+ px; make it smaller"):
        restorer(image)
    if place != "joining":
        with pytest.raises(SerpentError, match="not enough memory on cpu"):
            restorer.picture(Picture(pixels[..., :3], alpha=pixels[..., 3]))


def test_a_row_of_tiles_that_does_not_fit_is_made_of_smaller_ones(monkeypatch):
    """Where there is no memory for a strip of the image, tiles of half the side make one of half the height."""
    image = torch.rand(1, 3, 1100, 500)
    strips: list[int] = []
    whole = tiling.Tensor.new_zeros

    def new_zeros(self: Tensor, size: tuple[int, ...], **options: object) -> Tensor:
        if len(size) == 4:
            strips.append(size[2])
            if size[2] > 400:
                ends()
        return whole(self, size, **options)

    monkeypatch.setattr(tiling.Tensor, "new_zeros", new_zeros)
    model = identity_network()
    need = footprint.network_bytes(model, 1100 * 500, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(passes, "available", lambda device: 1.2 * need)
    goes_on = "not enough memory on cpu for an image of 500x1100 px: goes on in tiles of"
    with pytest.warns(UserWarning, match="would need"), pytest.warns(UserWarning, match=goes_on):
        torch.testing.assert_close(restore(image, model), image, atol=1e-6, rtol=0)
    assert strips[0] > 400 >= strips[-1]


def test_files_for_which_memory_ends_are_not_called_damaged(tmp_path, monkeypatch):
    photo = save_photo(tmp_path / "photo.png", 20, 24)
    picture = read_image(photo)
    monkeypatch.setattr("serpent_ir.image.files.decode", ends)
    with pytest.raises(ImageError, match=r"photo.png: does not fit in memory"):
        read_image(photo)
    monkeypatch.setattr("serpent_ir.image.encoders.encode", ends)
    with pytest.raises(ImageError, match=r"new.png: not enough memory to write it"):
        write_image(tmp_path / "new.png", picture)


def test_an_evaluation_names_the_image(tmp_path, monkeypatch):
    photo = save_photo(tmp_path / "photo.png", 20, 24)
    monkeypatch.setattr(evaluate, "ssim", ends)
    with pytest.raises(SerpentError, match=r"photo.png: not enough memory on cpu for an image of 24x20 px"):
        evaluate.evaluate_network(identity_network("deblur"), [photo], "deblur")


def test_a_command_says_it_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("serpent_ir.profiling.figures.new_figure", ends)
    said = serpent("report", tmp_path)
    assert said.exit_code == 1
    assert said.stderr.startswith("serpent: error: not enough memory (")
    assert said.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("megabytes", [30, 90, 500])
@pytest.mark.parametrize("command", ["restore", "degrade"])
def test_a_process_with_little_address_space(command, megabytes, tmp_path):
    """From the first import on: 30 MB end in Python's modules, 90 in numpy's, 500 in PyTorch's."""
    photo = save_photo(tmp_path / "photo.png", 20, 24)
    what = ["--task", "deblur"] if command == "degrade" else ["-n", "serpent_b.deblur"]
    call = [sys.executable, "-m", "serpent_ir", command, str(photo), "-o", str(tmp_path / "new.png"), *what]
    limit = f'ulimit -v {megabytes * 1024}; exec "$@"'
    done = subprocess.run(["sh", "-c", limit, "sh", *call], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr.startswith("serpent: error: not enough memory (")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["photo.png"]  # noqa: PTH208
