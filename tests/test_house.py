"""The house of ARCHITECTURE.md, counted: its rooms, its floors, and the imports between rooms.

A room is a package that holds modules, or a loose module beside the packages. Imports between rooms are counted as
pairs of rooms of which one imports the other. Modules that only hand on names of others are not counted.
"""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path

import grimp
import pytest

import serpent_ir

Imports = set[tuple[str, str]]
"""Pairs: who imports, and what."""

SOURCES = Path(serpent_ir.__file__).parent
ALIASES = {"serpent_ir.acceleration", "serpent_ir.compat", "serpent_ir.recipe", "serpent_ir.streaming"}
"""The first two are public names of what stands in `models`. The others stay for one release."""
ENTRIES = {"serpent_ir", "serpent_ir.__main__"}
LOOSE = {"demo", "errors", "evaluate", "metrics", "train"}
VARIABLES = re.compile(r"[\"'](RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR)[\"']")


@pytest.fixture(scope="module")
def imports() -> Imports:
    """Which module imports which."""
    graph = grimp.build_graph("serpent_ir", exclude_type_checking_imports=True, cache_dir=None)
    return {(name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)}


@functools.cache
def modules() -> set[str]:
    names = (path.relative_to(SOURCES.parent).with_suffix("") for path in SOURCES.rglob("*.py"))
    return {".".join(name.parts).removesuffix(".__init__") for name in names} - ALIASES - ENTRIES


@functools.cache
def room_of(module: str) -> str:
    parent = module.rpartition(".")[0]
    holds_modules = any(other.startswith(f"{module}.") for other in modules())
    return module if holds_modules or parent == "serpent_ir" else parent


def between(imports: Imports, room: Callable[[str], str]) -> Imports:
    return {(room(a), room(b)) for a, b in imports if {a, b} <= modules() and room(a) != room(b)}


def below(imports: Imports) -> dict[str, set[str]]:
    """What each imports."""
    found: dict[str, set[str]] = {}
    for name, other in imports:
        found.setdefault(name, set()).add(other)
    return found


def test_rooms_and_what_passes_between_them(imports):
    assert len({room_of(module) for module in modules()}) <= 20
    assert len(between(imports, room_of)) < 100


def test_nothing_is_loose_that_has_a_room():
    packages = {path.parent.name for path in SOURCES.glob("*/__init__.py")}
    assert {name.removeprefix("serpent_ir.") for name in modules() if name.count(".") == 1} - packages == LOOSE
    for alias in ALIASES:
        tree = ast.parse((SOURCES / f"{alias.rpartition('.')[2]}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))], alias


def test_no_file_imports_itself_by_way_of_others(imports):
    found, done, path = below(imports), set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(found.get(module, ())):
                visit(other)
            done.add(path.pop())

    for module in sorted(found):
        visit(module)


def test_floors(imports):
    """The longest way down, where a package is one room with the packages inside of it."""
    rooms = below(between(imports, lambda module: ".".join(module.split(".")[:2])))

    @functools.cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, rooms.get(room, ())), default=0)  # a circle of rooms would not end

    assert max(map(floor, rooms)) <= 8


def test_one_module_answers_which_process_this_is():
    reading = {
        path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py") if VARIABLES.search(path.read_text())
    }
    assert reading == {"system/processes.py"}


def test_private_names_stay_in_their_module():
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("serpent_ir"):
                private = [name.name for name in node.names if re.match("_[^_]", name.name)]
                assert not private, f"{path}: {private}"
