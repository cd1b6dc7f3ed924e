"""What ``locate`` measures, and with which hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from easyedit_moe import factworld
from easyedit_moe.comparison.settings import chosen_methods, resolve_hparams
from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.facts.records import NEUTRAL
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.hparams import MoEHyperParams, SolverHyperParams
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.localisation.tracing import TraceSettings
from easyedit_moe.localisation.windows import Window, candidate_windows, window_name
from easyedit_moe.workflow.session import Loaded
from easyedit_moe.workflow.settings import DEFAULT_METHOD, settings_for

STAGES = ("routing", "tracing", "reachability", "statistics", "trial", "experts")
"""What can be measured, in the order in which it is; "statistics" gathers what trials need, layers together."""
TOGETHER = 8
"""Layers whose statistics are gathered in one pass, so that their sums fit in memory."""
EDITS = 20
HELD_OUT = 200
"""Of the bundled model's records settings are chosen on those from here on; those before are for results."""


@dataclass(frozen=True)
class LocateSettings:
    """What is measured.

    Attributes:
        edits: facts that are measured and edited; None: 20, or all where there are fewer.
        skip: facts to leave out at the start; None: 0, or 200 of the bundled model's own.
        batch_size: facts that a trial edits together; batches follow each other.
        layers: MoE layers to measure; empty: all of them.
        widths: numbers of layers of the windows to try; empty: 1, 2 and that of the hparams.
        windows: most windows to try.
        stages: of `STAGES`, what to measure.
        tracing: noise, samples and seed.
        budget: minutes after which nothing more is begun; None: no limit.

    Raises:
        DataError: on construction, for a stage that is unknown or a number out of range.
    """

    edits: int | None = None
    skip: int | None = None
    batch_size: int = 50
    layers: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    windows: int = 24
    stages: tuple[str, ...] = STAGES
    tracing: TraceSettings = field(default_factory=TraceSettings)
    budget: float | None = None

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise DataError(f"What is measured must be of {', '.join(STAGES)}; found {', '.join(unknown) or 'none'}.")
        numbers = {"edits": self.edits, "batch_size": self.batch_size, "windows": self.windows}
        small = [f"{name} {value}" for name, value in numbers.items() if value is not None and value < 1]
        if small or (self.skip or 0) < 0 or (self.budget is not None and not self.budget > 0):
            raise DataError(
                "edits, batch size and windows must be at least 1, skip at least 0 and the budget greater than 0 "
                f"minutes; found {', '.join([*small, f'skip {self.skip or 0}', f'budget {self.budget}'])}."
            )


def default_facts(model: str | Loaded) -> str:
    """The bundled model's own records, or the neutral facts for any other model."""
    return factworld.MODEL_NAME if model == factworld.MODEL_NAME else NEUTRAL


def default_skip(facts: Any) -> int:
    """How many facts are left out at the start."""
    return HELD_OUT if str(facts) == factworld.MODEL_NAME else 0


def locate_hparams(
    model: str | Loaded,
    method: str,
    hparams: str | Path | MoEHyperParams | None,
    overrides: Mapping[str, Any],
) -> SolverHyperParams:
    """The hyper-parameters of targets and trials; those of a model that no YAML is for are chosen from its config.

    Raises:
        HyperParamsError, MethodError, DataError: see `settings_for`; also a method that does not solve for experts, or
            hparams of another site than these.
    """
    if not isinstance(model, str) or isinstance(hparams, MoEHyperParams):
        return _solver(settings_for(model, method, hparams, overrides))
    # As compare, and unlike edit, in the dtype that the YAML names, so that both give the same numbers.
    given = {name: value for name, value in overrides.items() if value is not None and value != ""}
    is_file = hparams is not None and Path(hparams).is_file()
    name = method or (chosen_methods([], hparams)[0] if is_file else DEFAULT_METHOD)
    return _solver(resolve_hparams(name, model, hparams, {**given, "model_name": model}))


def _solver(found: MoEHyperParams | BaselineHyperParams) -> SolverHyperParams:
    if not isinstance(found, SolverHyperParams):
        raise HyperParamsError(
            f"{found.alg_name} has no target vectors at a layer's output, so its layers are not located this way; use "
            f"a method that solves for experts, such as {DEFAULT_METHOD}."
        )
    if found.site != EXPERTS:
        raise HyperParamsError(
            f"locate measures routed experts and their layers; the hparams say site: {found.site}. Leave it out, or "
            "set site: experts; compare scores edits at any site."
        )
    return found


def at_layers(hparams: SolverHyperParams, layers: Sequence[int], target_cache_dir: str | None) -> SolverHyperParams:
    """The same hyper-parameters for another window of layers."""
    return replace(hparams, layers=list(layers), target_cache_dir=target_cache_dir)


def statistics_chunks(hparams: SolverHyperParams, windows: Sequence[Window]) -> list[Window]:
    """The layers that trials need statistics of, in chunks that are gathered together; none where none are needed."""
    if not hparams.needs_statistics:
        return []
    layers = sorted({layer for window in windows for layer in window})
    return [tuple(layers[start : start + TOGETHER]) for start in range(0, len(layers), TOGETHER)]


def windows_to_try(settings: LocateSettings, layers: Sequence[int], own: Sequence[int]) -> list[Window]:
    """The windows that are tried: evenly spread over the layers, and the hparams' own, ``own``.

    Raises:
        LayerError: a width that the layers do not have.
    """
    widths = settings.widths or tuple(width for width in dict.fromkeys((1, 2, len(own))) if width <= len(layers))
    found = candidate_windows(layers, widths, settings.windows)
    if set(own) <= set(layers) and tuple(own) not in found:
        found = [tuple(own), *found[: settings.windows - 1]]
    return sorted(found, key=lambda window: (len(window), window_name(window)))
