"""Private names of torch and DeepSpeed stay in the two files that say why they are needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parent
ALLOWED = {ROOT / "students" / "zero.py", ROOT / "system" / "private_api.py"}
LIBRARIES = ("torch", "deepspeed")
NAMED_TUPLE = {"_asdict", "_replace", "_fields"}  # public names of Python's, in spite of the underscore


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields every imported name of a file: as the file calls it, and its full path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                yield name, alias.name if alias.asname else name
                yield name, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def definitions(tree: ast.AST) -> Iterator[str]:
    """Yields the names of functions, classes and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root_name(node.value) == "self":
            yield node.attr


def root_name(node: ast.expr) -> str | None:
    """Returns the name that a chain of attributes, calls and indices begins with."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return None
    return node.id


def foreign_private_names(source: str, our_names: set[str]) -> list[str]:
    """Returns the private names of torch and DeepSpeed in a file, with their lines.

    They are private parts of what it imports from the two, and private attributes of any object where the engine
    itself defines no attribute of that name. Python's own modules may have theirs used.
    """
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    lines = []
    for name, path in imports(tree):
        modules[name] = path
        if path.split(".")[0] in LIBRARIES and any(map(is_private, path.split("."))):
            lines.append(f"import of {path}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        root = root_name(node.value)
        library = modules[root].split(".")[0] if root in modules else None
        if library in LIBRARIES or (library is None and node.attr not in our_names | NAMED_TUPLE):
            lines.append(f"line {node.lineno}: {ast.unparse(node)}")
    return lines


def test_private_names_of_torch_and_deepspeed_are_in_two_files() -> None:
    sources = {file: file.read_text() for file in ROOT.rglob("*.py")}
    our_names = {name for source in sources.values() for name in definitions(ast.parse(source))}
    uses = {
        str(file.relative_to(ROOT)): names
        for file, source in sources.items()
        if file not in ALLOWED and (names := foreign_private_names(source, our_names))
    }
    assert uses == {}
    assert all(foreign_private_names(sources[file], our_names) for file in ALLOWED)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.cuda.memory._snapshot()", ["line 2: torch.cuda.memory._snapshot"]),
        ("from torch.distributed import distributed_c10d as c\nc._world", ["line 2: c._world"]),
        ("import torch._dynamo", ["import of torch._dynamo"]),
        ("from torch._C._autograd import DeviceType", ["import of torch._C._autograd.DeviceType"]),
        ("from torch import Tensor\nTensor.mean(x)._version", ["line 2: Tensor.mean(x)._version"]),
        ("engine.optimizer._lazy_init()", ["line 1: engine.optimizer._lazy_init"]),
        ("import os\nos._exit(0)\nself._ours\ntorch.__version__", []),
    ],
)
def test_what_counts_as_private(source: str, expected: list[str]) -> None:
    assert foreign_private_names(source, {"_ours"}) == expected
