"""The house as CONTRIBUTING.md draws it: which folder imports from which, how long functions are, what types hide."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "easyedit_moe"
LONGEST = 60
LONGER_BY_REASON: dict[str, str] = {}
"""Function -> why it is longer than LONGEST lines."""


def floors(text: str) -> list[str]:
    """Rooms in the order of CONTRIBUTING.md, from the ground up."""
    block = re.search(r"```layers\n(.*?)```", text, re.DOTALL)
    assert block, "CONTRIBUTING.md shows the order of the folders in a block ```layers"
    return block[1].split()


def room_of(module: str) -> str:
    """easyedit_moe.moe.layers -> moe; the package itself -> "" """
    return module.removeprefix("easyedit_moe").strip(".").partition(".")[0]


def imports(source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and module of every import of this package, those inside functions and for types included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            if (node.module or "").partition(".")[0] == "easyedit_moe":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield node.lineno, inner if inner in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.partition(".")[0] == "easyedit_moe")


def violations(files: dict[str, str], order: list[str]) -> list[str]:
    """Imports from a room that does not stand before the importing one; ``files`` are sources by module."""
    found = []
    for module, source in files.items():
        here = room_of(module)
        if not here:
            continue  # the package's own face knows all rooms, by name only
        for line, target in imports(source, set(files)):
            there = room_of(target)
            if there and there != here and (there not in order or order.index(there) > order.index(here)):
                found.append(f"{module}:{line} imports {target}")
    return found


def sources() -> dict[str, str]:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    assert len(names) > 100
    return names


def order() -> list[str]:
    return floors((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_a_folder_imports_only_from_those_before_it() -> None:
    assert violations(sources(), order()) == []


def test_every_room_has_its_place_and_no_place_is_empty() -> None:
    rooms = {room_of(module) for module in sources()} - {""}
    assert sorted(order()) == sorted(rooms)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from easyedit_moe.editors import base", 1),
        ("from easyedit_moe import editors", 1),
        ("import easyedit_moe.commands.app", 1),
        ("def f():\n    from easyedit_moe.host.loading import load", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from easyedit_moe.editors.base import Editor", 1),
        ("from easyedit_moe.nowhere import x", 1),
        ("from easyedit_moe import __version__", 0),
        ("from easyedit_moe.facts.tokens import collate\nfrom easyedit_moe.moe import experts\nimport torch", 0),
    ],
)
def test_the_rule_sees_what_it_should(source: str, found: int) -> None:
    house = {"easyedit_moe": "", "easyedit_moe.editors": "", "easyedit_moe.moe.layers": source}
    assert len(violations(house, order())) == found


def test_the_algebra_is_pure() -> None:
    for path in (PACKAGE / "algebra").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] not in ("transformers", "numpy", "yaml"), (path, name)


def test_no_function_is_long_without_a_reason() -> None:
    long = {}
    for module, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONGEST:
                    long[f"{module}.{node.name}"] = length
    assert sorted(long) == sorted(LONGER_BY_REASON), long


def test_types_are_not_waved_through() -> None:
    ignores = [line for source in sources().values() for line in source.splitlines() if "type: ignore" in line]
    assert len(ignores) <= 10
    assert all(re.search(r"type: ignore\[[a-z-]+\]\s+# \w+", line) for line in ignores), ignores
    assert (PACKAGE / "py.typed").is_file()
