"""Hyper-parameters that were chosen for a model, each with its reason, and the commented YAML of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from easyedit_moe.editors.planner import MemoryPlan
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.hparams.overlay import overlaid


@dataclass(frozen=True)
class Chosen:
    """One value, and why it is that."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Proposal:
    """What a method gets for a model that no YAML is for.

    Attributes:
        method, model: names.
        values: that were chosen; what is not among them has the method's default.
        about: what was read of the model, in one line.
        memory: the plan of one batch.
        notes: what the user should know besides.
        measured: what was measured on the model, with an edit or a command; empty: nothing.
    """

    method: str
    model: str
    values: tuple[Chosen, ...]
    about: str
    memory: MemoryPlan
    notes: tuple[str, ...] = ()
    measured: str = ""

    def hparams(self, overrides: Mapping[str, Any] | None = None) -> MoEHyperParams:
        """The hyper-parameters; ``overrides`` count more.

        Raises:
            HyperParamsError: an override that the method does not know, or a value out of range.
        """
        values = overlaid({"alg_name": self.method, **{one.name: one.value for one in self.values}}, overrides or {})
        return hyperparams_class(self.method).from_dict(values, f"{self.method} on {self.model}")

    def yaml(self) -> str:
        """A YAML file that `load_hyperparams` reads, with the reason of each value at the end of its line."""
        peak = (
            f"Planned memory: {_gigabytes(self.memory.peak)} GB at the peak of a batch of {self.memory.edits} edits, "
        )
        peak += f"of which the model {_gigabytes(self.memory.shapes.parameters)} GB."
        head = [
            f"{self.method} on {self.model}: chosen from its config; {self.measured or 'nothing was measured on it'}. "
            "`easyedit-moe compare --hparams` with this file shows what it does to your facts.",
            self.about,
            peak,
            *self.notes,
            "What is not here has the method's default: `easyedit-moe methods --show` with this file prints all.",
        ]
        lines = [f"# {line}" for text in head for line in textwrap.wrap(text, 118, break_long_words=False)]
        lines.append(yaml_line("alg_name", self.method, ""))
        return "\n".join([*lines, *(yaml_line(one.name, one.value, one.reason) for one in self.values)]) + "\n"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e7 else f"{count / 1e9:.4f}"


def yaml_line(name: str, value: Any, reason: str = "") -> str:
    """One setting of a YAML file, with its reason as a comment at the end."""
    options: dict[str, Any] = {"allow_unicode": True, "width": 10**6}
    if isinstance(value, list):
        text = f"{name}: {yaml.safe_dump(value, default_flow_style=True, **options)}"
    else:
        text = yaml.safe_dump({name: value}, **options)
    return text.strip() + (f"  # {' '.join(reason.split())}" if reason else "")
