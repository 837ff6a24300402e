"""Objects that people hand to other processes: copied, pickled, and in children that were forked at any moment."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from networks import small_network
from serpent_ir.data import Pack, TrainingSet, list_images, write_pack
from serpent_ir.degradations import DEGRADATIONS, create_degradation, evaluation_generator
from serpent_ir.files import Source
from serpent_ir.inference import Restorer

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 64, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    return images


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_restorer(copied, used):
    restorer = Restorer(small_network("sr8"), tile=64, tile_overlap=8)
    if used:
        restorer(IMAGE)
    other = copied(restorer)
    np.testing.assert_array_equal(other(IMAGE), restorer(IMAGE))
    assert (other.model is restorer.model) == (copied is copy.copy)
    # Copies that share the network take turns; others do not wait for one another.
    assert (other._lock is restorer._lock) == (copied is copy.copy)
    assert (other.tile, other.tile_overlap, other.precision, other.scale) == (64, 8, "auto", 8)


def test_restorer_is_copied_while_it_works():
    restorer = Restorer(small_network())
    copies = []
    wanted = restorer(IMAGE, progress=lambda *_: copies.append(pickle.dumps(restorer)))  # inside its lock
    np.testing.assert_array_equal(pickle.loads(copies[0])(IMAGE), wanted)


def restored_by(restorer: Restorer, image: np.ndarray) -> np.ndarray:
    torch.set_num_threads(1)
    return restorer(image)


def test_restorer_goes_to_a_spawned_process():
    restorer = Restorer(small_network())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(restored_by, (restorer, IMAGE)), restorer(IMAGE))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("task", DEGRADATIONS)
def test_degradation(task, copied):
    degradation = create_degradation(task)
    clean = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    one, other = (d(clean, generator=evaluation_generator(0, 1)) for d in (degradation, copied(degradation)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("copied", COPIES)
def test_source(folder, copied):
    source = copied(Source(folder / "0.png").load())
    np.testing.assert_array_equal(source.picture().pixels, np.asarray(Image.open(folder / "0.png")))


@pytest.mark.parametrize("copied", COPIES)
def test_packed_set_and_training_set(folder, copied):
    packed = folder.parent / "set.serpent"
    write_pack([folder], packed)
    pack = copied(Pack(packed))
    np.testing.assert_array_equal(pack.pixels(1), Pack(packed).pixels(1))
    image = copied(list_images(packed)[2])
    assert str(image) == f"{packed}:2.png"
    for paths in ([folder], [packed], [folder, packed]):
        images = TrainingSet(paths, create_degradation("deblur"), torch.device("cpu"))
        batch, other = images.batch(range(6), 16, seed=0), copied(images).batch(range(6), 16, seed=0)
        assert all(map(torch.equal, batch, other))


def test_a_packed_set_is_pickled_without_its_pixels(folder):
    packed = folder.parent / "set.serpent"
    write_pack([folder], packed)
    images = TrainingSet([packed], create_degradation("deblur"), torch.device("cpu"))
    assert len(pickle.dumps(images)) + len(pickle.dumps(Pack(packed))) < packed.stat().st_size / 4
    assert isinstance(copy.deepcopy(images).store._images[0].base, np.memmap)


# A thread of the parent is inside a Restorer, and so holds its locks, while the main one forks. Both have used
# PyTorch's threads, which a child has not.
FORK = """
    import os, signal, sys, threading
    import numpy as np, torch
    from PIL import Image
    from serpent_ir import Restorer
    from serpent_ir.image import decoders
    from serpent_ir.inference import network
    from serpent_ir.system.forks import Lock
    sys.path.insert(0, sys.argv[1])
    from networks import small_network

    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    restorer = Restorer(small_network().train(), tile=128)
    wanted = restorer(image)
    inside, forked = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        forked.wait()

    def work():
        with network._evaluation_mode(restorer.model), decoders._bound_lock:
            decoders._bounds.append(Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
            restorer(image, progress=wait)
            Image.MAX_IMAGE_PIXELS = decoders._bounds.pop()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    own = Lock()
    with own:
        child = os.fork()
    if not child:
        signal.alarm(60)
        same = np.array_equal(restorer(image), wanted)
        with own:
            bound = Image.MAX_IMAGE_PIXELS
        with decoders._bound_lock:
            os._exit(not (same and restorer.model.training and bound))
    forked.set()
    thread.join()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool(restorer.model.training and Image.MAX_IMAGE_PIXELS))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_a_thread_restores():
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout == "0 True\n", done.stderr


def test_no_lock_of_the_package_outlives_a_fork():
    """Every lock is one that a child makes anew."""
    package = Path(sys.modules["serpent_ir"].__path__[0])
    found = [p.name for p in package.rglob("*.py") for word in ("Lock(", "RLock(", "Condition(", "Semaphore(")
             if f"threading.{word}" in p.read_text()]  # fmt: skip
    assert set(found) <= {"system/forks.py"}
