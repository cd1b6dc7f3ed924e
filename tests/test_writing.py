"""Whatever the package writes goes through `easyedit_moe.storage`, where errors of the system are typed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "easyedit_moe"

METHODS = {"write_text", "write_bytes", "mkdir", "makedirs", "savefig", "save", "savez", "save_pretrained", "rename",
           "symlink_to", "hardlink_to", "copyfile", "copy2", "copytree", "mkdtemp", "mkstemp", "touch",
           "NamedTemporaryFile", "TemporaryDirectory"}  # fmt: skip
NAMES = {"save_file", "serialize_file"}
OWN = {
    "patch.save",
    "whole.save",
    "adapter.save",
    "self.adapter.save",
    "self.save",
    "measured.save",
    "found.measured.save",
}
"""Methods of ours by these names."""
INSIDE = {
    "checkpoints/revert.py": "within new_folder",
    "checkpoints/rewriting.py": "within new_folder or replacing_in_place",
    "checkpoints/saving.py": "within new_folder",
    "checkpoints/shards.py": "within new_folder or replacing_in_place",
    "checkpoints/staging.py": "within storage's writing",
    "adapters/saving.py": "within filled_folder",
    "adapters/base_saving.py": "stands in for transformers' method",
    "host/dense_statistics.py": "within replacing",
    "workflow/init.py": "within replacing",
    "measure.py": "a file of the kernel, not one of ours",
}
"""Files outside of storage/ that call the system, and why they may."""


def calls(source: str) -> list[str]:
    """What in a source writes by itself."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if _writes(node)]


def _writes(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    text = ast.unparse(node.func)
    if text.rpartition(".")[2] == "open":
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        texts = [arg.value for arg in modes if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        return any(set(mode) <= set("rwaxb+t") and set("wax+") & set(mode) for mode in texts)
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in METHODS and text not in OWN
    return text in NAMES


def test_only_storage_calls_the_system() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {name: made for name, source in sources.items() if (made := calls(source))}
    outside = {name: made for name, made in found.items() if not name.startswith("storage/")}
    assert {name: made for name, made in outside.items() if name not in INSIDE} == {}
    assert sorted(INSIDE) == sorted(outside), "a reason that no file needs"


@pytest.mark.parametrize(
    ("source", "count"),
    [("path.write_text('x')", 1), ("open(p, 'w')", 1), ("path.open(mode='ab')", 1), ("open(p)", 0), ("p.open('rb')", 0),
     ("torch.save(x, p)", 1), ("patch.save(p)", 0), ("save_file(t, p)", 1), ("write_text(p, 'x')", 0),
     ("figure.savefig(p)", 1), ("Path(p).mkdir()", 1)],
)  # fmt: skip
def test_the_rule_sees_what_it_should(source: str, count: int) -> None:
    assert len(calls(source)) == count
