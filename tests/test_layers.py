"""The order of rooms in docs/architecture.md against the imports in the code: none goes against it, none in a circle."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import ROOT

PACKAGE = "rim_dist"


class Import(NamedTuple):
    """A file of the package imports a module; `loading`: while it is loaded itself, not later or for types."""

    importer: str
    imported: str
    line: int
    loading: bool


def rooms() -> list[tuple[list[str], list[str]]]:
    """Rows of the table: modules or packages, and what they load without; the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    rows = re.findall(r"^\| (`.*?) \| .* \| (.*?) \|$", text, flags=re.MULTILINE)
    return [(re.findall(r"`(.*?)`", names), without.split(", ")) for names, without in rows]


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []

    def walk(node: ast.AST, loading: bool) -> None:
        for child in ast.iter_child_nodes(node):
            now = loading and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                now = False
            if isinstance(child, ast.Import):
                found.extend(Import(name, alias.name, child.lineno, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    found.append(Import(name, whole if whole in modules() else str(child.module), child.lineno, now))
            walk(child, now)

    walk(tree, True)
    return found


@functools.cache
def all_imports() -> list[Import]:
    return [found for name, path in modules().items() for found in imports_of(name, path)]


def room_of(module: str) -> int:
    """Number of a module's row: that of the longest name that it begins with."""
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    fitting = [
        (len(name), number)
        for number, (names, _) in enumerate(rooms())
        for name in names
        if inner == name or inner.startswith(f"{name}.")
    ]
    assert fitting or not inner, f"{module} is in no room of docs/architecture.md"
    return max(fitting)[1] if inner else -1


def where(found: Import) -> str:
    return f"{modules()[found.importer].relative_to(ROOT)}:{found.line}"


def against_the_order(imports: list[Import]) -> list[str]:
    return [
        f"{where(found)}: {found.importer} imports {found.imported}, which stands below it in docs/architecture.md"
        for found in imports
        if found.imported in modules() and room_of(found.imported) > room_of(found.importer)
    ]


def circles(imports: list[Import]) -> list[str]:
    """Modules that import each other, found by leaving out, again and again, those that import none of what is left."""
    left = {name: {i.imported for i in imports if i.importer == name and i.imported in modules()} for name in modules()}
    while free := [name for name, others in left.items() if not others & left.keys() - {name}]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_import_goes_up_the_table() -> None:
    assert against_the_order(all_imports()) == []


def test_no_circles() -> None:
    assert circles(all_imports()) == []


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    name = f"{PACKAGE}.attention.choice"
    source = tmp_path / "choice.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rim_dist.cli import main\n"
        "def f():\n    import rim_dist.training.trainer\nclass C:\n    from rim_dist import config\n"
    )
    found = imports_of(name, source)
    inside = [i for i in found if i.imported.startswith(PACKAGE)]
    assert [(i.imported, i.line, i.loading) for i in inside] == [
        ("rim_dist.cli", 3, False),
        ("rim_dist.training.trainer", 5, False),
        ("rim_dist.config", 7, True),
    ]
    assert [text.partition(": ")[0] for text in against_the_order(found)] == [
        "rim_dist/attention/choice.py:3",
        "rim_dist/attention/choice.py:5",
    ]
    circle = [Import("rim_dist.config", "rim_dist.files", 1, False), Import("rim_dist.files", "rim_dist.config", 1, False)]
    assert circles(circle) == ["rim_dist.config", "rim_dist.files"]


@functools.cache
def loaded_with(module: str) -> frozenset[str]:
    """All that is imported when a module is loaded: modules of the package, and names of other packages."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in modules():
            parent = name.rpartition(".")[0]
            todo += [parent] if parent else []
            todo += [i.imported for i in all_imports() if i.importer == name and i.loading]
    return frozenset(name if name in modules() else name.partition(".")[0] for name in seen)


@pytest.mark.parametrize("number", range(len(rooms())), ids=lambda number: rooms()[number][0][0])
def test_what_a_room_loads_without(number: int) -> None:
    _, without = rooms()[number]
    for name in modules():
        if room_of(name) == number:
            wrong = loaded_with(name) & set(without)
            assert not wrong, f"{name} loads {', '.join(wrong)}"
