"""The kinds of faults. Each function injects one and returns what broke, "" where all held.

Random numbers come from a generator of the fault's own number. Nothing here holds an input that crashes or hangs a
library of others: images are damaged at random, and where one of theirs falls over it, that is counted by format
(`OutsideError`).
"""

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from faults.calls import Child, serpent
from faults.scene import COMMANDS, Scene, differing, found, photo, refused, words

Rng = np.random.Generator


class OutsideError(Exception):
    """A library of others crashed or hung; the argument says with which format."""


def _any(rng: Rng, *names: str) -> str:
    return str(rng.choice(names or list(COMMANDS)))


def signals(scene: Scene, place: Path, rng: Rng) -> str:
    """Ctrl-C, SIGTERM or SIGKILL at any moment; the same command then makes the right bytes, and nothing besides."""
    command = _any(rng)
    sent = int(rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
    child = scene.start(command, place)
    ended = child.end(meanwhile=[(rng.uniform(0, 1.2 * scene.seconds[command]), lambda: child.send(sent))])
    if problem := words(ended):
        return f"{command}, {signal.Signals(sent).name}: {problem}"
    if ended.status not in (0, 128 + sent, 130, -sent):
        return f"{command}, {signal.Signals(sent).name}: status {ended.status}, {ended.last}"
    problem = scene.again(command, place)
    return problem and f"{command}, {signal.Signals(sent).name}: {problem}"


def full_disk(scene: Scene, place: Path, rng: Rng) -> str:
    """No file may grow above a size: one line, whole files alone, and the same command then ends as it should."""
    command = _any(rng, *(name for name in COMMANDS if name != "evaluate"))
    size = int(2 ** rng.uniform(0, 18)) - 1
    ended = scene.start(command, place, limits={resource.RLIMIT_FSIZE: size}).end()
    told = f"{command}, {size} bytes a file"
    if problem := refused(ended):
        return f"{told}: {problem}"
    made = found(command, place, ended)
    if command != "train" and (problem := differing({n: scene.results[command].get(n, "") for n in made}, made)):
        return f"{told}: {problem}"
    if not ended.status and (problem := differing(scene.results[command], made)):
        return f"{told}: status 0, {problem}"
    problem = scene.again(command, place)
    return problem and f"{told}: {problem}"


def short_memory(scene: Scene, place: Path, rng: Rng) -> str:
    """Address space that ends: one line, or the right result."""
    command = _any(rng)
    more = int(2 ** rng.uniform(0, 9) * (1 << 20))
    ended = scene.start(command, place, limits={resource.RLIMIT_AS: more}).end()
    told = f"{command}, {more >> 20} MB more"
    if problem := refused(ended):
        return f"{told}: {problem}"
    if not ended.status and (problem := differing(scene.results[command], found(command, place, ended))):
        return f"{told}: status 0, {problem}"
    problem = scene.again(command, place)
    return problem and f"{told}: {problem}"


def _damage(file: Path, rng: Rng) -> str:
    """Flip some bits of a file, cut it, or write zeros or noise into it."""
    content = bytearray(file.read_bytes())
    how = _any(rng, "flip", "cut", "zeros", "noise")
    if not content or how == "cut":
        del content[int(rng.integers(0, len(content) + 1)) :]
    elif how == "flip":
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    else:
        begin = int(rng.integers(len(content)))
        size = min(int(rng.integers(1, 64)), len(content) - begin)
        content[begin : begin + size] = bytes(size) if how == "zeros" else rng.bytes(size)
    file.write_bytes(content)
    return how


def damaged_weights(scene: Scene, place: Path, rng: Rng) -> str:
    """A file of weights of ours: refused in a line, or what it says is as before."""
    how = _damage(place / "w.safetensors", rng)
    command = _any(rng, "restore", "evaluate")
    ended = scene.call(command, place)
    problem = refused(ended)
    if not ended.status:
        problem = problem or differing(scene.results[command], found(command, place, ended))
    return problem and f"{command}, {how} in weights: {problem}"


def damaged_pack(scene: Scene, place: Path, rng: Rng) -> str:
    """A packed set: refused by evaluate, train and pack, or the results are those of the whole one."""
    shutil.copy(scene.folder / "true-pack" / "out" / "p.serpent", place)
    shutil.rmtree(place / "photos")
    how = _damage(place / "p.serpent", rng)
    command = _any(rng, "evaluate", "train", "pack")
    changed = [str(word).replace("photos", "p.serpent") for word in COMMANDS[command]]
    more = ["train=[p.serpent]", "val=p.serpent"] if command == "train" else []
    whole = place.with_name("whole-pack")
    if not whole.exists():
        shutil.copytree(place, whole)
        shutil.copy(scene.folder / "true-pack" / "out" / "p.serpent", whole)
    key = f"{command} of a pack"
    if key not in scene.results:
        true = scene.place(f"true-{command}-of-pack")
        shutil.copy(whole / "p.serpent", true)
        scene.results[key] = found(command, true, Child(serpent(*changed, *more), true).end())
    ended = Child(serpent(*changed, *more), place).end()
    problem = refused(ended)
    if not ended.status:
        problem = problem or differing(scene.results[key], found(command, place, ended))
    return problem and f"{command}, {how} in a packed set: {problem}"


def damaged_manifest(scene: Scene, place: Path, rng: Rng) -> str:
    """The same command goes on, and what is missing comes."""
    shutil.copytree(scene.folder / "true-restore" / "out", place / "out")
    true = scene.folder / "true-restore"
    (place / "done.jsonl").write_text((true / "done.jsonl").read_text().replace(str(true), str(place)))
    how = _damage(place / "done.jsonl", rng)
    gone = sorted(path for path in (place / "out").rglob("*") if path.is_file())
    gone[int(rng.integers(len(gone)))].unlink()
    problem = scene.again("restore", place)
    return problem and f"{how} in a manifest: {problem}"


def damaged_run(scene: Scene, place: Path, rng: Rng) -> str:
    """Any file of a run that was stopped after four of six steps: it goes on to the same bits, or says why not."""
    run = place / "run"
    shutil.copytree(scene.folder / "true-train" / "run", run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for name in ("weights.safetensors", "best.safetensors", "run.png"):
        (run / name).unlink(missing_ok=True)
    files = sorted(path for path in run.rglob("*") if path.is_file() and "pictures" not in path.parts)
    file = files[int(rng.integers(len(files)))]
    how = _damage(file, rng)
    ended = scene.call("train", place, "--resume")
    problem = refused(ended)
    if not ended.status:
        problem = problem or differing(scene.results["train"], found("train", place))
    return problem and f"{how} in {file.relative_to(place)}: {problem}"


def damaged_image(scene: Scene, place: Path, rng: Rng) -> str:
    """One image of a folder: whatever becomes of it, the others come out right."""
    files = sorted(path for path in (place / "photos").rglob("*") if path.is_file())
    file = files[int(rng.integers(len(files)))]
    how = _damage(file, rng)
    ended = scene.call("restore", place, seconds=30)
    problem = refused(ended)
    if problem.startswith(("hangs", "crashes")):
        raise OutsideError(file.suffix.removeprefix("."))
    name = str(file.relative_to(place / "photos").with_suffix(""))
    expected = {n: h for n, h in scene.results["restore"].items() if not n.startswith(f"{name}.")}
    made = {n: h for n, h in found("restore", place).items() if not n.startswith(f"{name}.")}
    problem = problem or differing(expected, made)
    return problem and f"{how} in a .{file.suffix}: {problem}"


def replaced_source(scene: Scene, place: Path, rng: Rng) -> str:
    """Somebody saves a photo anew at any moment: called again, the output is that of the new one."""
    command = _any(rng, "restore", "compare")
    Image.fromarray(photo(rng, 24, 40)).save(place / "new.png")
    at = rng.uniform(0, 1.1 * scene.seconds[command])
    child = scene.start(command, place)
    ended = child.end(meanwhile=[(at, lambda: os.replace(place / "new.png", place / "photos" / "0.png"))])  # noqa: PTH105
    if problem := refused(ended):
        return f"{command}, a source replaced: {problem}"
    if (place / "new.png").exists() or (command == "compare" and not ended.status):
        return ""  # it was over before; or done before the file changed: --skip-existing asks for no more
    again = scene.call(command, place)
    truth = scene.place(f"{place.name}-truth")
    shutil.copy(place / "photos" / "0.png", truth / "photos")
    true = scene.call(command, truth)
    problem = refused(again) or differing(found(command, truth, true), found(command, place, again))
    shutil.rmtree(truth)
    return problem and f"{command}, a source replaced: {problem}"


def two_writers(scene: Scene, place: Path, rng: Rng) -> str:
    """The same command twice at once: what is there at the end is whole."""
    command = _any(rng, "restore", "compare", "degrade", "pack", "train")
    first = scene.start(command, place)
    second: list[Child] = []
    delay = rng.uniform(0, 0.5 * scene.seconds[command])
    ends = [first.end(meanwhile=[(delay, lambda: second.append(scene.start(command, place)))])]
    ends += [child.end() for child in second]
    for ended in ends:
        if problem := refused(ended):
            return f"two of {command}: {problem}"
    if all(ended.status for ended in ends):
        return f"two of {command}: both refused, {ends[0].last}"
    problem = scene.again(command, place)
    return problem and f"two of {command}: {problem}"


def threads(scene: Scene, place: Path, rng: Rng) -> str:
    """A `Restorer` in several threads gives what it gives in one."""
    images = [photo(rng, *rng.integers(9, 40, 2)) for _ in range(4)]

    def work() -> int:
        from serpent_ir import Restorer, load_model

        restorer = Restorer(load_model("w.safetensors"))
        expected = [restorer(image) for image in images]
        wrong: list[int] = []

        def one(index: int) -> None:
            order = [(i + index) % 4 for i in range(8)]
            wrong.extend(i for i in order if not np.array_equal(restorer(images[i]), expected[i]))

        running = [threading.Thread(target=one, args=(index,)) for index in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return len(wrong)

    ended = Child(work, place).end()
    return words(ended) or (f"threads: {ended.status} results differ" if ended.status else "")


def forks(scene: Scene, place: Path, rng: Rng) -> str:
    """A fork while another thread uses a `Restorer`: the child gets the same result."""
    image, delay = photo(rng, *rng.integers(9, 60, 2)), rng.uniform(0, 0.05)

    def work() -> int:
        from serpent_ir import Restorer, load_model

        restorer = Restorer(load_model("w.safetensors"))
        expected, over = restorer(image), threading.Event()
        thread = threading.Thread(target=lambda: [restorer(image) for _ in iter(over.is_set, True)])
        thread.start()
        over.wait(delay)
        if not (pid := os.fork()):
            signal.alarm(20)
            os._exit(int(not np.array_equal(restorer(image), expected)))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        over.set()
        thread.join()
        return abs(status)

    ended = Child(work, place).end()
    told = {0: "", 1: "forks: the child's result differs", 14: "forks: the child hangs"}
    return words(ended) or told.get(ended.status, f"forks: the child ends with {ended.status}")


KINDS: dict[str, Callable[[Scene, Path, Rng], str]] = {
    "signals": signals,
    "full disks": full_disk,
    "damaged weights": damaged_weights,
    "short memory": short_memory,
    "damaged packed sets": damaged_pack,
    "damaged manifests": damaged_manifest,
    "damaged runs": damaged_run,
    "damaged images": damaged_image,
    "replaced sources": replaced_source,
    "two writers": two_writers,
    "threads": threads,
    "forks": forks,
}
