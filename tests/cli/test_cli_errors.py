"""Wrong calls of `serpent`: one line, an exit status, and nothing changes."""

import sys
from pathlib import Path

import pytest

from commands import save_photo, save_recipe, serpent, tree, untrained_weights

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    return untrained_weights(tmp_path_factory.mktemp("weights"))


# Bad input: (arguments, exit status, what the one line says). {name} is a file or folder of the fixture below.
WORKS = "--weights {deblur}"
BAD_INPUT = {
    "missing file": ("restore {none.png} -o {out} " + WORKS, 2, "{none.png}: no such file or folder"),
    "missing file among others": ("restore {a.png} {none.png} -o {out} " + WORKS, 2, "{none.png}: no such file"),
    "empty folder": ("restore {empty} -o {out} " + WORKS, 2, "{empty}: no images"),
    "empty file": ("restore {empty.png} -o {kept.png} " + WORKS, 1, "{empty.png}"),
    "truncated PNG": ("restore {cut.png} -o {kept.png} " + WORKS, 1, "{cut.png}"),
    "truncated JPEG": ("restore {cut.jpg} -o {kept.png} " + WORKS, 1, "{cut.jpg}"),
    "no task": ("restore {a.png} -o {kept.png} -n serpent_b --weights {bare}", 2, "{bare}: does not say which task"),
    "no task, video": (
        "video {a.png} -o {out}.mp4 -n serpent_b --weights {bare}",
        2,
        "{bare}: does not say which task",
    ),
    "no task, export": ("export -o {out}.onnx -n serpent_b --weights {bare}", 2, "{bare}: does not say which task"),
    "size no one has": ("profile -n serpent_b --size 3000000000 --device cpu", 2, "sizes must be from 1 to 16777216"),
    "IPv6": ("demo --host ::1", 2, "--host ::1: gradio serves no IPv6 address"),
    "task of no degradation": ("restore {a.png} -o {kept.png} -n serpent_b.nope --weights {bare}", 2, "'nope'"),
    "several into one": ("restore {a.png} {b.jpg} -o {new.png} " + WORKS, 2, "{new.png}: is the name of an image"),
    "folder into one": ("restore {photos} -o {new.png} " + WORKS, 2, "{new.png}: is the name of an image"),
    "text": ("restore {notes.txt} -o {kept.png} " + WORKS, 1, "{notes.txt}"),
    "text named PNG": ("degrade {text.png} -o {kept.png} --task deblur", 1, "{text.png}"),
    "unknown model": ("restore {a.png} -o {kept.png} -n nope.deblur", 2, "no weights 'nope.deblur' ship; valid: "),
    "no weights for the task": ("restore {a.png} -o {kept.png} -n serpent_b.nope", 2, "no weights 'serpent_b.nope'"),
    "no weights without a task": ("restore {a.png} -o {kept.png} -n serpent_h", 2, "no weights 'serpent_h'"),
    "missing weights": ("restore {a.png} -o {kept.png} --weights {none}", 1, "{none}: no such weights file"),
    "no weights in the file": (
        "restore {a.png} -o {kept.png} --weights {text.png}",
        1,
        "{text.png}: is no weights file",
    ),
    "weights are a folder": ("restore {a.png} -o {kept.png} --weights {empty}", 1, "{empty}"),
    "other network": ("restore {a.png} -o {kept.png} -n serpent_l " + WORKS, 1, "{deblur}: not weights of serpent_l"),
    "weights of an unknown network": (
        "restore {a.png} -o {kept.png} --weights {bare}",
        2,
        "{bare}: does not say which",
    ),
    "unknown device": ("restore {a.png} -o {kept.png} --device gpu " + WORKS, 2, "no device 'gpu' here; valid: auto"),
    "file as output folder": ("restore {a.png} {b.png} -o {notes.txt} " + WORKS, 1, "{notes.txt}"),
    "file above the output": ("restore {a.png} -o {notes.txt}/out/a.png " + WORKS, 1, "{notes.txt}/out"),
    "folder as output file": ("restore {a.png} -o {folders} " + WORKS, 1, "{folders}/a.png"),
    "a format that is not written": ("restore {a.png} -o {a.gif} " + WORKS, 2, "{a.gif}: cannot write .gif; use .png"),
    "output over input": ("restore {a.png} -o {a.png} " + WORKS, 2, "{a.png}: would overwrite an input"),
    "outputs over inputs": ("restore {photos} -o {photos} " + WORKS, 2, "x.png: would overwrite an input"),
    "output linked to an input": ("degrade {a.png} -o {link.png} --task deblur", 2, "{link.png}: would overwrite"),
    "two outputs of one name": ("restore {a.png} {other/a.png} -o {out} " + WORKS, 2, "{out}/a.png: both {a.png} and"),
    "the same input twice": ("restore {a.png} {a.png} -o {out} " + WORKS, 2, "{out}/a.png: both"),
    "a tile that cannot be": ("restore {a.png} -o {kept.png} --tile 100 " + WORKS, 2, "a multiple of 32"),
    "a tile in words": ("restore {a.png} -o {kept.png} --tile large " + WORKS, 2, "tile 'large'; valid: auto, none"),
    "an overlap that cannot be": ("restore {a.png} -o {kept.png} --tile 64 --tile-overlap 40 " + WORKS, 2, "0 to 32"),
    "unknown precision": ("restore {a.png} -o {kept.png} --precision int8 " + WORKS, 2, "no precision 'int8'; valid"),
    "a pattern of nothing": ("restore {photos}/*.gif -o {out} " + WORKS, 2, "{photos}/*.gif: no images match"),
    "unknown task": ("degrade {a.png} -o {kept.png} --task nope", 2, "'nope'"),
    "too small for sr8": ("degrade {tiny.png} -o {kept.png} --task sr8", 1, "{tiny.png}: sr8: the image is 7x9 px"),
    "evaluate: missing folder": ("evaluate --data {none} --task deblur " + WORKS, 2, "{none}"),
    "evaluate: empty folder": ("evaluate --data {empty} --task deblur " + WORKS, 2, "{empty}"),
    "evaluate: broken image": ("evaluate --data {broken} --task deblur " + WORKS, 1, "{broken}/x.png"),
    "evaluate: no weights ship": ("evaluate --data {photos} --task jpeg", 2, "no weights for jpeg ship; give a file"),
    "evaluate: unknown task": ("evaluate --data {photos} --task nope " + WORKS, 2, "'nope'"),
    "evaluate: other task": ("evaluate --data {photos} --task sr8 " + WORKS, 2, "{deblur} undoes deblur, not sr8"),
    "evaluate: unknown model": ("evaluate --data {photos} --task sr8 -n nope", 2, "'nope'"),
    "train: missing recipe": ("train {none}", 2, "{none}"),
    "train: no YAML": ("train {cut.png}", 2, "{cut.png}"),
    "train: unknown key": ("train {recipe.yaml}", 2, "{recipe.yaml}: unknown key colour"),
    "train: no key": ("train {recipe.yaml} colour", 2, "'colour'"),
    "train: ill-typed key": ("train {good.yaml} lr=fast", 2, "command line: lr: expected float, got str 'fast'"),
    "train: unknown model": ("train {good.yaml} model=nope", 2, "unknown model 'nope'; valid: serpent_b"),
    "train: unknown task": ("train {good.yaml} task=nope", 2, "'nope'; the known ones are deblur, sr8"),
    "train: --resume of a plan": ("train {good.yaml} --dry-run --resume", 2, "--resume: of no use with --dry-run"),
    "train: options of a plan": (
        "train {good.yaml} --tensorboard --stop-after-minutes 0 --dry-run",
        2,
        "--stop-after-minutes, --tensorboard: of no use with --dry-run",
    ),
    "train: missing images": ("train {good.yaml} val={none}", 2, "{none}: no such folder"),
    "train: file as the run's folder": ("train {good.yaml} out={notes.txt}", 1, "{notes.txt}"),
}
if sys.platform == "linux":
    BAD_INPUT["unwritable output"] = ("restore {a.png} {b.png} -o /proc/out " + WORKS, 1, "/proc/out")


@pytest.fixture
def places(tmp_path, weights) -> dict[str, Path]:
    for name in ("a.png", "b.png", "other/a.png", "photos/x.png"):
        save_photo(tmp_path / name, 12, 16)
    save_photo(tmp_path / "tiny.png", 9, 7)
    for name in ("cut.png", "cut.jpg"):
        whole = save_photo(tmp_path / name, 64, 64).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for name in ("empty", "folders/a.png", "broken"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("notes.txt", "text.png", "broken/x.png", "kept.png"):
        (tmp_path / name).write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "recipe.yaml").write_text("colour: blue\n")
    save_recipe(tmp_path / "good.yaml", tmp_path / "photos", tmp_path / "run")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    return weights


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(case, places, tmp_path):
    arguments, status, expected = BAD_INPUT[case]

    def fill(text: str) -> str:
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text.replace("{", f"{tmp_path}/").replace("}", "")

    before = tree(tmp_path)
    result = serpent(*map(fill, arguments.split()))
    lines = result.stderr.splitlines()
    assert result.exit_code == status, result.stderr
    assert len(lines) == 1
    assert lines[0].startswith("serpent: error: ")
    assert fill(expected) in lines[0]
    assert result.stdout == ""
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("restore", "a.png"), "'-o'"),
        (("restore", "-o", "out"), "INPUT"),
        (("degrade", "a.png", "-o", "out"), "'--task'"),
        (("degrade", "a.png", "-o", "out", "--task", "deblur", "--seed", "-1"), "'--seed'"),
        (("restore", "a.png", "-o", "out", "--nope", "4"), "--nope"),
        (("restore", "a.png", "-o", "out", "--tile-overlap", "-1"), "'--tile-overlap'"),
        (("nope",), "'nope'"),
    ],
)
def test_a_wrong_call_is_status_2(arguments, expected):
    result = serpent(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
