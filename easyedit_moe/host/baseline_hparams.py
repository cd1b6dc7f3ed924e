"""Hyper-parameters of EasyEdit's own methods for a comparison: its YAML files, read without importing EasyEdit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyedit_moe.errors import HyperParamsError, MethodError, did_you_mean
from easyedit_moe.hparams import presets, read_yaml

PROTOCOL = "EasyEdit: teacher-forced token accuracy; locality is the share of tokens predicted as before the edits"
"""What EasyEdit's metrics mean."""

HOST_METHODS = {method.name: str(method.host_name) for method in presets.host_methods()}
"""Row of a comparison -> EasyEdit's ``alg_name``."""

CLASSES = {str(method.host_name): method.hparams.partition(":")[2] for method in presets.host_methods()}
"""``alg_name`` -> the class of hyper-parameters that EasyEdit has for it."""


@dataclass(frozen=True)
class BaselineHyperParams:
    """One of EasyEdit's methods and the content of its YAML file, whose keys are EasyEdit's own.

    Attributes:
        method: the row's name, a key of `HOST_METHODS`.
        values: the file's content; given to EasyEdit's class of hyper-parameters when the method runs.
    """

    method: str
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in HOST_METHODS:
            raise MethodError(
                f"Unknown EasyEdit method {self.method!r}.{did_you_mean(self.method, HOST_METHODS)} Known: "
                f"{', '.join(HOST_METHODS)}."
            )
        margins = self.values.get("act_margin")
        if isinstance(margins, list) and len(margins) == 3:  # EasyEdit's files of WISE have its three under one key
            values = {name: value for name, value in self.values.items() if name != "act_margin"}
            split = dict(zip(("alpha", "beta", "gamma"), margins, strict=True))
            object.__setattr__(self, "values", values | split)
        wanted, found = HOST_METHODS[self.method], self.values.get("alg_name")
        if found != wanted:
            raise HyperParamsError(f"{self.method} needs alg_name {wanted!r}; found {found!r}.")
        size = self.values.get("batch_size", 1)
        if type(size) is not int or size < 1:
            raise HyperParamsError(f"batch_size must be a whole number from 1; found {size!r}.")
        if wanted == "WISE":
            self._check_wise()
        elif not isinstance(layers := self.values.get("layers"), list) or not all(
            type(layer) is int and layer >= 0 for layer in layers
        ):
            raise HyperParamsError(f"layers must be a list of whole numbers from 0; found {layers!r}.")

    def _check_wise(self) -> None:
        save, merge = self.values.get("save_freq"), self.values.get("merge_freq")
        if type(save) is not int or type(merge) is not int or save < 1 or merge < 1 or merge % save:
            raise HyperParamsError(f"merge_freq must be a multiple of save_freq; found {merge!r} and {save!r}.")
        if not self.layers:
            raise HyperParamsError(
                f"inner_params must name a parameter as in model.layers[2].self_attn.o_proj.weight; found "
                f"{self.values.get('inner_params')!r}."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are edited."""
        if "layers" in self.values:
            return tuple(self.values["layers"])
        return tuple(int(n) for n in re.findall(r"layers\[(\d+)\]", " ".join(map(str, self._inner_params()))))

    def _inner_params(self) -> list[Any]:
        names = self.values.get("inner_params")
        return names if isinstance(names, list) else []

    @staticmethod
    def read(method: str, path: str | Path, overrides: Mapping[str, Any] | None = None) -> BaselineHyperParams:
        """From a YAML file; only those ``overrides`` count whose keys the file has.

        Raises:
            HyperParamsError: a missing file, or one of another method.
        """
        values = read_yaml(path)
        values = {name: _number(value) for name, value in values.items()}
        known = {name: value for name, value in (overrides or {}).items() if name in values}
        return BaselineHyperParams(method, {**values, **known})

    @property
    def alg_name(self) -> str:
        """The row's name."""
        return self.method

    def named_for(self, stack: str) -> BaselineHyperParams:
        """The same, where module names of a text model become those of a multimodal one whose layers are at ``stack``.

        The names in the files start with ``model.``; behind a vision tower that is ``model.language_model.``.
        """
        root = stack.removesuffix("layers")
        if root in ("model.", "") or not root.startswith("model."):
            return self
        named: dict[str, Any] = {
            key: root + value.removeprefix("model.")
            for key, value in self.values.items()
            if (key.endswith("_module_tmp") or key == "ln_f_module")
            and isinstance(value, str)
            and value.startswith("model.")
            and not value.startswith(root)
        }
        if self._inner_params():
            named["inner_params"] = [
                root + name.removeprefix("model.") if str(name).startswith("model.layers") else name
                for name in self._inner_params()
            ]
        return BaselineHyperParams(self.method, {**self.values, **named})

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return dict(self.values)


def _number(value: Any) -> Any:
    """YAML reads ``1e-3`` as a text; EasyEdit takes it as a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
