"""Makes pages of the site from the code. MkDocs calls this as a hook.

The command line comes from Typer, the keys of recipes from `Recipe`, and the models from the cards of the weights.
Results and architecture come from their files in the repository.
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, make in PAGES.items():
        if old := files.get_file_from_path(path):
            files.remove(old)
        files.append(File.generated(config, path, content=make()))
    return files


def command_line() -> str:
    """Every command, its arguments and options."""
    from serpent_ir.cli import app

    group: Any = typer.main.get_command(app)
    intro = ["# Command line", "", "`serpent --help` and `serpent COMMAND --help` say the same.", ""]
    return "\n".join([*intro, *_commands(group, "serpent")])


def _commands(group: Any, name: str) -> list[str]:
    lines: list[str] = []
    for key, command in group.commands.items():
        full = f"{name} {key}"
        if hasattr(command, "commands"):
            lines += _commands(command, full)
            continue
        arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
        lines += [f"## {full}", "", command.help or "", "", "```text", " ".join([full, "[OPTIONS]", *arguments]), "```"]
        lines += ["", "| | meaning | default |", "| --- | --- | --- |"]
        lines += [_option(parameter) for parameter in command.params if not parameter.hidden]
        lines += [""]
    return lines


def _option(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = f"`{parameter.metavar}`"
    else:
        shown = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    plain = isinstance(parameter.default, (str, int, float)) and not isinstance(parameter.default, bool)
    default = f"`{parameter.default}`" if plain and parameter.default != "" else ""
    return f"| {shown} | {_cell(parameter.help or '')} | {default} |"


def recipes() -> str:
    """The keys of a recipe and of its stages. They are the fields of the classes, each with the comment beside it."""
    from serpent_ir.training.recipe import Recipe, Stage

    lines = [
        "# Recipes",
        "",
        "A recipe is a YAML file. `base` names another one, whose keys it replaces. `key=value` on",
    ]
    lines += ["the command line replaces both, with dots into lists and options (`stages.0.batch=8`).", ""]
    for kind, heading in ((Recipe, "Keys"), (Stage, "Keys of a stage")):
        lines += [f"## {heading}", "", inspect.getdoc(kind) or "", "", "| key | type | default | meaning |"]
        lines += ["| --- | --- | --- | --- |", *_fields(kind), ""]
    return "\n".join(lines)


def _fields(kind: Any) -> list[str]:
    said = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    rows = []
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        default = "required" if required else f"`{field.default if field.default is not dataclasses.MISSING else {}}`"
        kind_of = inspect.formatannotation(field.type) if not isinstance(field.type, str) else field.type
        rows.append(f"| `{field.name}` | `{_cell(kind_of)}` | {default} | {_cell(said.get(field.name, ''))} |")
    return rows


def models() -> str:
    """The weights with their figures in one table, and the card of each."""
    folder = ROOT / "src" / "serpent_ir" / "weights"
    lines = [
        "# Weights",
        "",
        "`-n NAME` chooses weights. `serpent evaluate --seed 0` measured the very files that ship. A JSON file beside",
        "each of them has its figures and its SHA-256. [Networks](networks.md) says what the networks cost. The inputs",
        "of `sr8` are the small images upsampled by bicubic interpolation.",
        "",
    ]
    lines += [
        "| weights | images | n | input PSNR | PSNR | input SSIM | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text())["evaluations"]:
            db, of_one = (
                (f"{row[key]:.2f}" for key in ("input_psnr", "psnr")),
                (f"{row[key]:.3f}" for key in ("input_ssim", "ssim")),
            )
            figures = " | ".join([row["data"], str(row["n"]), *db, *of_one])
            lines.append(f"| [`{path.stem}`](#{path.stem.replace('.', '')}) | {figures} |")
    return "\n\n".join(
        ["\n".join(lines), *(_repository(_lower(card.read_text())) for card in sorted(folder.glob("*.md")))]
    )


def carriers() -> str:
    """What image files carry, by format; what videos carry; formats that are read and written."""
    from serpent_ir.image.carriers import CARRIERS, CONVERTED, KEPT, TOLD, WRITTEN
    from serpent_ir.image.folders import SUFFIXES

    formats = [*WRITTEN, ".jxl"]
    marks = {KEPT: "kept", CONVERTED: "converted", TOLD: "-"}
    lines = [
        (ROOT / "docs" / "reference" / "files.md").read_text().rstrip(),
        "",
        "## Beside the pixels of an image",
        "",
    ]
    lines += [
        "*kept*: the file holds it as it was. *converted*: the format says the same in another way. -: the format has",
        "no place for it, and a line names what was left out.",
        "",
    ]
    lines += [" | ".join(["| what", *(f"`{suffix}`" for suffix in formats), ""]).rstrip()]
    lines += ["| --- " * (len(formats) + 1) + "|"]
    for row in CARRIERS.values():
        lines.append(f"| {_cell(row.words)} | " + " | ".join(marks[row.fate(suffix)] for suffix in formats) + " |")
    read = ", ".join(f"`{suffix}`" for suffix in sorted(SUFFIXES))
    lines += [
        "",
        "## What a folder is searched for",
        "",
        f"{read}. A file that you name is read whatever its suffix is.",
    ]
    return "\n".join(lines) + "\n"


def video_carriers() -> str:
    """What is compared between an old video and the new one."""
    from serpent_ir.files.video_carriers import CARRIERS, FRAME_DATA

    page = (ROOT / "docs" / "howto" / "video.md").read_text()
    told = ", ".join(CARRIERS)
    return page.replace("CARRIERS", told).replace("FRAME_DATA", ", ".join(dict.fromkeys(FRAME_DATA.values())))


def _lower(text: str) -> str:
    """A page as a part of another one, with every heading one deeper."""
    return re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)


def _repository(text: str, folder: str = "") -> str:
    """A file of the repository as a page. Links to its other files become their names."""
    site = {"ARCHITECTURE.md": "develop/architecture.md", "benchmarks/RESULTS.md": "results.md"}

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith(("http", "#")):
            return match.group(0)
        return f"[{words}](/{site[target]})" if target in site else f"`{words.strip('`')}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", link, re.sub(r"^!\[.*?\]\(.*?\)\n", "", text, flags=re.MULTILINE))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {
    "reference/cli.md": command_line,
    "reference/recipes.md": recipes,
    "models.md": models,
    "reference/files.md": carriers,
    "howto/video.md": video_carriers,
    "results.md": lambda: _repository((ROOT / "benchmarks" / "RESULTS.md").read_text()),
    "develop/architecture.md": lambda: _repository((ROOT / "ARCHITECTURE.md").read_text()),
}
"""Path in the site -> what makes the page."""
