"""README and the pages of docs/ do what they say, and name what is there.

A block of Python or of commands runs in a folder with small images. One that cannot run here has a line before it,
`<!-- not run: WHY -->`, and its commands are checked as far as that goes. A block of YAML is a file, whose name stands
in a line before it, `<!-- file: NAME -->`.
"""

import importlib
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import skimage.data
import typer
from PIL import Image

from commands import serpent
from serpent_ir import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMING = [*PAGES, ROOT / "ARCHITECTURE.md"]
BLOCK = re.compile(r"(?:^<!-- (not run|file): ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = ["stages.0.steps=4", "val_every=4"]
"""What `serpent train` of a page gets in the tests besides."""


@dataclass(frozen=True)
class Block:
    said: str
    about: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    return [Block(*match) for match in BLOCK.findall(page.read_text())]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    photo = Image.fromarray(skimage.data.astronaut()[40:100, 180:260])
    for name in ("photo.jpg", "photo.png", "photo.tif", "clean.png", "holiday/1.png", "holiday/sea/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo.save(tmp_path / name)
    photo.save(tmp_path / "stack.tif", save_all=True, append_images=[photo])
    (tmp_path / "list.txt").write_text("photo.png\nholiday/1.png\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
@pytest.mark.filterwarnings("ignore:serpent_ir")  # where no C compiler is, the scan says that a slower one serves
def test_blocks_run(page, folder):
    for block in blocks(page):
        if block.said == "not run" or block.language == "text":
            continue
        if block.language == "python":
            exec(compile(block.text, name_of(page), "exec"), {"__name__": "example"})
        elif block.language == "sh":
            for line in block.commands:
                _run(line)
        else:
            assert (block.language, block.said) == ("yaml", "file"), f"a block of {block.language!r} is not tested"
            (folder / block.about).write_text(block.text)


def _run(line: str) -> None:
    program, *args = shlex.split(line, comments=True)
    assert program == "serpent", f"{line}: runs in no test; put it into a block of its own and say why"
    result = serpent(*args, *FEWER * (args[0] == "train"))
    assert result.exit_code == 0, f"{line}\n{result.output}"


COMMANDS = [(name_of(page), line) for page in PAGES for block in blocks(page) if block.said == "not run"
            for line in block.commands if block.language == "sh"]  # fmt: skip


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value[:60])
def test_commands_that_are_not_run_could_be(page, line):
    words = shlex.split(line.split(" | ")[-1], comments=True)
    if words[0] == "torchrun":
        words = ["serpent", *words[words.index("serpent_ir.cli") + 1 :]]
    if words[0] == "serpent":
        group = typer.main.get_command(cli.app)
        context = group.make_context("serpent", words[1:], resilient_parsing=False)
        _parses(group, context)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert not [word for word in words[1:] if "=" not in word and word not in targets]
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")}
        assert asked <= extras.keys()
    else:
        assert words[0] in ("python", "pytest", ".venv/bin/pytest", "git", "npm"), f"{line}: what is it?"


def _parses(group: click.Command, context: click.Context) -> None:
    """Raise click's UsageError for a command or an option that is not there."""
    name, args = context._protected_args[:1], context.args
    words = [*context._protected_args, *args]
    while words and hasattr(group, "commands"):
        name, *words = words
        group = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
        context = group.make_context(name, list(words), parent=context)
        if hasattr(group, "commands"):
            words = [*context._protected_args, *context.args]


def test_a_first_example_runs_without_the_second():
    """Each block of Python on the page for programs stands by itself: none uses a name of another."""
    for block in blocks(ROOT / "docs" / "howto" / "program.md"):
        if block.language == "python":
            assert re.search(r"^(import|from) ", block.text), block.text


@pytest.mark.parametrize("page", NAMING, ids=name_of)
def test_modules_and_files_that_pages_name_are_there(page):
    text = page.read_text()
    missing = [name for name in set(re.findall(r"(?<![\w./-])serpent_ir(?:\.\w+)+", text)) if not _is_there(name)]
    files = {path.relative_to(ROOT).as_posix() for part in ("src", "tests", "tools", "benchmarks", "examples", "docs")
             for path in (ROOT / part).rglob("*.*")}  # fmt: skip
    named = set(re.findall(r"(?<![\w./*-])((?:[\w.-]+/)*[\w-]+\.(?:py|cuh?|h|c))(?![\w/])", text))
    missing += [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]
    if page.parent == ROOT:  # the site's own links are checked where it is built
        missing += [link for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text) if not (ROOT / link).exists()]
    assert not missing


def test_the_speeds_in_the_readme_are_those_of_one_run():
    """The table under "How fast, and how good", cell by cell, to the digits that it prints."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "profile.h200.json").read_text())
    runs = {(row["model"], row["size"]): row for row in rows}
    number = r"([\d.]+)"
    line = rf"^\| `(\w+)` \| {number} M \| {number} ms \| {number} ms \| {number} ms \| {number} ms \| {number} GB \|$"
    table = re.findall(line, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in table} >= {"serpent_b", "serpent_l", "serpent_h", "unet_32", "swinir_b"}
    for name, *printed in table:
        step = runs[name, 1024]
        exact = [step["params"] / 1e6]
        exact += [runs[name, size]["infer_graph_ms"] or runs[name, size]["infer_ms"] for size in (256, 1024, 2048)]
        exact += [step["train_graph_ms"] or step["train_ms"], step["train_gb"]]
        for said, figure in zip(printed, exact, strict=True):
            digits = len(said.partition(".")[2])
            assert float(said) == pytest.approx(figure, abs=0.51 * 10**-digits), (name, said, figure)


def _is_there(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
