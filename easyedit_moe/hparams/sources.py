"""Where every value of a method's hyper-parameters comes from: who says it, and whose choice it is."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from easyedit_moe.hparams import presets
from easyedit_moe.hparams.base import MoEHyperParams
from easyedit_moe.hparams.files import find_yaml, hparams_folder, read_layers, read_yaml

_LINE = re.compile(r"^(\w+):[^#]*?(?:#\s*(.*))?$")
_NAMED = re.compile(r"\b(papers?|ours|easyedit|moeedit|memit|rome|unke|mote|adalora|alphaedit|peft|published)\b", re.I)


@dataclass(frozen=True)
class SourcedValue:
    """One setting of a method on a model.

    Attributes:
        name, value: as the hyper-parameters have them.
        said_in: "MoTE/factworld.yaml", "factworld.yaml" (what all methods share of the model), "the method" (it defines
            the method), or "default".
        source: whose choice it is: the papers', EasyEdit's or ours, in the words of the file's comment or of the
            default's description.
    """

    name: str
    value: Any
    said_in: str
    source: str


def sourced_values(path: str | Path) -> list[SourcedValue]:
    """Every setting of an hparams file, ours or EasyEdit's, with its source, in the order of the hyper-parameters.

    Raises:
        HyperParamsError: a file that is missing or can't be used. MethodError: an unknown method.
    """
    own, shared, shared_file = read_layers(path)
    method = presets.find_method(str(own.get("alg_name", shared.get("alg_name"))))
    file = find_yaml(path)
    comments = yaml_comments(file)
    if method.host_name is not None:  # EasyEdit's file is the whole of it
        return [SourcedValue(name, value, _short(file), comments.get(name, "")) for name, value in own.items()]
    cls: type[MoEHyperParams] = presets.located(method.hparams)
    values, described = cls.from_hparams(path).to_dict(), descriptions(cls)
    shared_comments = yaml_comments(shared_file) if shared_file is not None else {}
    found = []
    for name, value in values.items():
        if name in own:
            said_in, source = _short(file), comments.get(name, "")
        elif name in shared and shared_file is not None:
            said_in, source = _short(shared_file), shared_comments.get(name, "")
        elif name in method.fixed:
            said_in, source = "the method", method.source
        else:
            said_in, source = "default", origin(described.get(name, ""))
        found.append(SourcedValue(name, value, said_in, source))
    return found


def yaml_comments(path: str | Path) -> dict[str, str]:
    """The comment at the end of each top-level key's line, without its #; empty where there is none."""
    matches = [_LINE.match(line) for line in find_yaml(path).read_text(encoding="utf-8").splitlines()]
    known = read_yaml(path)
    return {match[1]: (match[2] or "").strip() for match in matches if match and match[1] in known}


def descriptions(cls: type) -> Mapping[str, str]:
    """The text under each field of a class of hyper-parameters and of the classes that it derives from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, MoEHyperParams):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            found |= _described(tree)
    return {item.name: found[item.name] for item in fields(cls) if item.name in found}


def _described(tree: ast.stmt) -> dict[str, str]:
    found = {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for statement, after in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[statement.target.id] = inspect.cleandoc(text.value)
    return found


def origin(description: str) -> str:
    """The sentences of a field's description that name whose choice its default is."""
    sentences = re.split(r"(?<=[.;])\s+(?=[A-Z])", " ".join(description.split()))
    return " ".join(sentence for sentence in sentences[1:] if _NAMED.search(sentence))


def _short(file: Path) -> str:
    folder = hparams_folder().resolve()
    return str(file.resolve().relative_to(folder)) if folder in file.resolve().parents else str(file)
