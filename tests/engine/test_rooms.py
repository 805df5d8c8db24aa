"""Where things stand: rooms import earlier rooms only, modules have no cycles, files stay short."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each may import from those before it.
ROOMS = [
    "system",
    "config",
    "data",
    "models",
    "students",
    "teachers",
    "compute",
    "reporting",
    "evaluation",
    "run",
    "train",
    "search",
    "cli",
]
LINES = {"engine": 450, "recipes": 450, "kernels": 650}
ENTRIES = 14  # of engine/, so that it is seen at a glance


def modules(package: str) -> dict[str, Path]:
    """Returns the Python files of a package by dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path, known: set[str]) -> Iterator[str]:
    """Yields the modules among `known` that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import"
            # `from engine.data import batches` names a module; `from engine.data.batches import Step` does not.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in names]
        yield from (name for name in names if name in known)


def graph(*packages: str) -> dict[str, set[str]]:
    """Returns the modules that each module of the packages imports."""
    files = {name: file for package in packages for name, file in modules(package).items()}
    return {name: set(imports(file, set(files))) - {name} for name, file in files.items()}


def test_rooms_import_earlier_rooms_only() -> None:
    rooms = {name.split(".")[1] for name in modules("engine") if name != "engine"}
    assert rooms == set(ROOMS), "the order of the rooms is not the tree's"
    for module, imported in graph("engine").items():
        for other in imported:
            assert module != "engine", f"engine/__init__.py imports {other}, and so everything would"
            if other != "engine":
                room, other_room = module.split(".")[1], other.split(".")[1]
                assert ROOMS.index(other_room) <= ROOMS.index(room), f"{module} imports {other}, of a later room"


@pytest.mark.parametrize("package", ["engine", "kernels"])
def test_no_modules_import_one_another_in_a_circle(package: str) -> None:
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_recipes_import_engine_and_engine_imports_kernels_never_backwards() -> None:
    order = ("kernels", "engine", "recipes")
    for module, imported in graph(*order).items():
        for other in imported:
            package, other_package = module.split(".")[0], other.split(".")[0]
            assert order.index(other_package) <= order.index(package), f"{module} imports {other}"


def test_files_are_short_enough_to_read_at_once() -> None:
    for package, most in LINES.items():
        for file in (ROOT / package).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".html"):
                lines = file.read_text(encoding="utf-8").count("\n")
                assert lines <= most, f"{file.relative_to(ROOT)} has {lines} lines, at most {most} are read with ease"


def test_engine_is_seen_at_a_glance() -> None:
    entries = sorted(path.name for path in (ROOT / "engine").iterdir() if path.name != "__pycache__")
    assert len(entries) <= ENTRIES, entries
