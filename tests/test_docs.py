"""The examples of docs/ do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    photo = Image.fromarray(skimage.data.astronaut()[:60, :80])
    (folder / "holiday").mkdir()
    for name in ("photo.jpg", "photo.png", "photo.tif", "holiday/1.png", "holiday/2.png"):
        photo.save(folder / name)
    return folder


def test_there_are_examples():
    assert len(EXAMPLES) >= 10


@pytest.mark.filterwarnings("ignore:serpent_ir")  # where no C compiler is, the scan says that a slower one serves
def test_the_examples_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for example in EXAMPLES:
        exec(compile(example, "docs/python.md", "exec"), {"__name__": "example"})
    told = capsys.readouterr().out
    assert "6 of 6 tiles" in told
    assert "none.png: cannot be read: No such file or directory" in told
    made = {"restored.png", "restored.tif", "large.tif", "restored/1.png", "restored/2.png", "done.jsonl"}
    assert not [name for name in made if not (folder / name).exists()]


def test_an_example_runs_by_itself(folder):
    run = subprocess.run([sys.executable, "-c", EXAMPLES[0]], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
