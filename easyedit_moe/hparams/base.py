"""What all hyper-parameters share: closed dataclasses, read from and written to YAML.

Names are EasyEdit's where EasyEdit has one. An unknown key, a wrong type or a value out of range is an error; so is a
value that contradicts the method named by ``alg_name`` (see `easyedit_moe.hparams.presets`).
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import yaml

from easyedit_moe.errors import HyperParamsError, did_you_mean, shown
from easyedit_moe.hparams import presets
from easyedit_moe.hparams.devices import device_named
from easyedit_moe.hparams.files import read_with_defaults
from easyedit_moe.hparams.overlay import overlaid
from easyedit_moe.storage.files import write_text

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**31 - 1
"""Bound on the size of every whole number, seeds included: what all libraries below take."""


class _Methods:
    """Class attribute: the methods of the table that a class serves; empty for an abstract one."""

    def __get__(self, instance: Any, owner: type) -> tuple[str, ...]:
        return presets.methods_of(owner)


@dataclass(kw_only=True)
class MoEHyperParams:
    """What all methods share."""

    methods: ClassVar[_Methods] = _Methods()

    alg_name: str
    """Method, one of the class's ``methods``."""
    model_name: str
    """Hub name or folder of the model; "factworld" is the bundled one."""
    layers: list[int]
    """Critical layers, increasing. Papers: Qwen3-30B-A3B 3-7, GPT-OSS-20B 3-5, Qwen3.6-35B-A3B 3-6."""
    device: int | str = "cpu"
    """Device to load on: "cpu", "cuda", "cuda:1" or a GPU's number. Ours: cpu."""
    model_parallel: bool = False
    """Spread the model over all devices (``device_map="auto"``). EasyEdit: false."""
    trust_remote_code: bool = False
    """Let code that comes with the checkpoint run; without it such a checkpoint is refused. Ours: false."""
    dtype: str = "bfloat16"
    """Dtype to load the model in: float32, bfloat16 or float16. Editing arithmetic is float32 or better anyway.
    Ours: bfloat16."""
    batch_size: int = 50
    """Requests per edit in ``batch_edit``. Papers: 50."""
    chat: bool = False
    """Put each prompt into the tokenizer's chat template as the user's turn, for edits and scores. Ours: false."""
    max_length: int = 512
    """Tokens at which a text of the statistics corpus, or an evaluation prompt, is cut. Ours: 512."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise HyperParamsError("MoEHyperParams is abstract; use the class of your method.")
        self.alg_name = presets.canonical_name(_name(self.alg_name))
        if self.alg_name not in self.methods:
            raise HyperParamsError(
                f"{type(self).__name__} is for {', '.join(self.methods)}; found alg_name {self.alg_name!r}."
            )
        for name, value in presets.METHODS[self.alg_name].items():
            if getattr(self, name) != value:
                raise HyperParamsError(
                    f"{self.alg_name} means {name} = {value!r}; found {shown(getattr(self, name))}. "
                    "Remove the key, or choose the method that you mean."
                )
        self._check_types()
        self._check_ranges()

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            fitted = _fit(value, hints[item.name])
            if fitted is _MISFIT:
                raise HyperParamsError(
                    f"{item.name} must be {_describe(hints[item.name])}; found {shown(value)} ({type(value).__name__})."
                )
            setattr(self, item.name, fitted)

    def _check_ranges(self) -> None:
        self._require_at_least({"batch_size": 1, "max_length": 1})
        for item in fields(self):
            value = getattr(self, item.name)
            for one in value if isinstance(value, list) else [value]:
                self._require(item.name, not isinstance(one, float) or isfinite(one), "finite")
                small = not isinstance(one, int) or abs(one) <= LARGEST
                self._require(item.name, small, f"a whole number of at most {LARGEST} in size")
                self._require(
                    item.name,
                    not isinstance(one, str) or _is_plain(one),
                    "a text without NUL and halves of characters (lone surrogates)",
                )
        for name in ("model_name", *(name for name in ("stats_dir", "target_cache_dir") if hasattr(self, name))):
            self._require(name, getattr(self, name) is None or bool(getattr(self, name).strip()), "not blank")
        self._require_one_of({"dtype": DTYPES})
        device_named(self.device)
        ordered = all(b > a for a, b in zip(self.layers, self.layers[1:], strict=False))
        self._require("layers", bool(self.layers) and ordered and min(self.layers) >= 0, "increasing and not empty")

    def _require_at_least(self, lows: Mapping[str, float]) -> None:
        for name, low in lows.items():
            self._require(name, getattr(self, name) >= low, f"at least {low}")

    def _require_one_of(self, choices: Mapping[str, Sequence[Any]]) -> None:
        for name, allowed in choices.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    def _require(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise HyperParamsError(f"{name} must be {expected}; found {shown(getattr(self, name))}.")

    @classmethod
    def from_hparams(cls, path: str | Path, **overrides: Any) -> MoEHyperParams:
        """Read a YAML file, and what it shares with others of its model (see `read_with_defaults`).

        A name without folder, like ``MoTE/factworld``, means a file that ships with the package.

        Raises:
            HyperParamsError: missing file, not a mapping, unknown key, wrong type or value.
        """
        return cls.from_dict(overlaid(read_with_defaults(path), overrides), str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "hparams") -> MoEHyperParams:
        """Build from a mapping; fixed settings of the method are filled in.

        Raises:
            HyperParamsError: not a mapping, an unknown or missing key, a wrong type or value.
        """
        if not isinstance(values, Mapping):
            raise HyperParamsError(f"{where} must be a mapping of names to values; found {shown(values)}.")
        known = {f.name: f for f in fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise HyperParamsError(
                f"{where}: unknown key '{unknown[0]}' for {cls.__name__}.{did_you_mean(str(unknown[0]), known)}"
            )
        missing = [
            n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values
        ]
        if missing:
            raise HyperParamsError(f"{where}: missing {', '.join(missing)}.")
        fixed = presets.METHODS.get(presets.canonical_name(_name(values["alg_name"])), {})
        return cls(**{**{k: v for k, v in fixed.items() if k in known}, **values})

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for YAML or JSON."""
        return asdict(self)

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields to a YAML file, in full or not at all.

        Raises:
            WriteError: it can't be written.
        """
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` (ints are taken as floats, and YAML's "1e-5" strings too), or ``_MISFIT``."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        exact = next((o for o in options if type(value) is o), None)
        if exact is not None:
            return value
        return next((f for f in (_fit(value, o) for o in options) if f is not _MISFIT), _MISFIT)
    if origin is list:
        if not isinstance(value, list):
            return _MISFIT
        items = [_fit(v, typing.get_args(hint)[0]) for v in value]
        return _MISFIT if _MISFIT in items else items
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _MISFIT
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else _MISFIT
    return value if type(value) is hint else _MISFIT


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise HyperParamsError(f"alg_name must be the name of a method; found {shown(value)}.")
    return value


def _is_plain(text: str) -> bool:
    """Whether a text can be a path and be written to a file."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(o) for o in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__
