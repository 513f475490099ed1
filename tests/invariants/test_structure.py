"""Rules of the source code: where methods are named, length, who knows other processes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flowgrain
from flowgrain.methods import METHODS

ROOT = Path(flowgrain.__file__).parent
PATHS = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
CLASSES = [cls for cls in map(METHODS.get, METHODS) if cls.__module__.startswith("flowgrain.")]
HOME = {cls.name: ROOT / "methods" / f"{cls.__module__.split('.')[-1]}.py" for cls in CLASSES}

MAX_FILE, MAX_CLASS, MAX_FUNCTION = 350, 200, 60
"""Lines."""

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of all nodes that are documentation: strings that stand alone as a statement."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of every string constant that is not documentation."""
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in ignored
        ):
            yield node.lineno, node.value


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, attribute, definition, argument and import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                for part in (*alias.name.split("."), alias.asname or alias.name):
                    yield node.lineno, part


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module, and of every name that is imported from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def place(path: Path, line: int, what: object) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def inside(path: Path, package: str) -> bool:
    return path.relative_to(ROOT).parts[0] == package


def test_every_method_has_a_file_in_the_package():
    assert len(CLASSES) >= 12
    assert all(home.is_file() for home in HOME.values())


def test_only_the_file_of_a_method_names_it():
    found = []
    class_names = {cls.__name__ for cls in CLASSES}
    for path, tree in TREES.items():
        found += [
            place(path, line, repr(text))
            for line, text in strings(tree)
            if text in HOME and path != HOME[text]
        ]
        if not inside(path, "methods"):
            found += [
                place(path, line, name) for line, name in identifiers(tree) if name in class_names
            ]
    assert not found, "\n".join(found)


def test_code_is_short():
    found = []
    for path, tree in TREES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            found.append(place(path, 1, f"{lines} lines, more than {MAX_FILE}"))
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lines = node.end_lineno - first + 1
                if lines > limit:
                    found.append(
                        place(path, node.lineno, f"{node.name}: {lines} lines, more than {limit}")
                    )
    assert not found, "\n".join(found)


def test_only_distributed_knows_other_processes():
    found = []
    for path, tree in TREES.items():
        if inside(path, "distributed"):
            continue
        found += [
            place(path, line, text) for line, text in strings(tree) if text in LAUNCHER_VARIABLES
        ]
        found += [
            place(path, line, name)
            for line, name in imported_modules(tree)
            if name == "torch.distributed" or name.startswith("torch.distributed.")
        ]
        found += [
            place(path, node.lineno, "torch.distributed")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
    assert not found, "\n".join(found)


def test_the_core_and_the_methods_know_no_model_and_no_process_group():
    found = []
    forbidden = ("diffusers", "transformers", "peft", "torch.distributed", "flowgrain.distributed")
    for path, tree in TREES.items():
        if inside(path, "core") or inside(path, "methods"):
            found += [
                place(path, line, name)
                for line, name in imported_modules(tree)
                if any(name == f or name.startswith(f"{f}.") for f in forbidden)
            ]
    assert not found, "\n".join(found)
