"""``locate``: which layers and which experts hold facts, by measuring, and which window of layers edits them best."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.report import check_folder
from easyedit_moe.comparison.rows import PRE_EDIT
from easyedit_moe.comparison.saved import row_of
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import CoverageWarning, DataError
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.facts.records import EvaluationRecord, FactSet, load_records
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import MoEHyperParams, SolverHyperParams
from easyedit_moe.localisation.prompts import traced_facts
from easyedit_moe.localisation.reachability import reachability
from easyedit_moe.localisation.routing import routing_alikeness
from easyedit_moe.localisation.tracing import CausalTracing
from easyedit_moe.localisation.windows import Window, by_promise, near, window_name
from easyedit_moe.measure import synchronise
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.checks import versions
from easyedit_moe.progress import progress_bar
from easyedit_moe.statistics.corpus import corpus_hash
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.storage.files import temporary_folder
from easyedit_moe.targets.cache import cached_targets
from easyedit_moe.targets.search import TargetSearch, TargetSettings
from easyedit_moe.workflow.locate_cost import Cost, Workload, costs, seconds_of
from easyedit_moe.workflow.locate_saved import Measured
from easyedit_moe.workflow.locate_settings import (
    EDITS,
    STAGES,
    LocateSettings,
    at_layers,
    default_facts,
    default_skip,
    locate_hparams,
    statistics_chunks,
    windows_to_try,
)
from easyedit_moe.workflow.screening import fact_set, screen
from easyedit_moe.workflow.session import Loaded, Loading, load, model_name

logger = logging.getLogger(__name__)

Facts = str | Path | FactSet | Sequence[EditRequest | EvaluationRecord]
Unit = int | Window


@dataclass(frozen=True)
class Location:
    """What was measured.

    Attributes:
        measured: all rows, by stage.
        costs: what was expected before, of what was left to do then.
        layers: that were measured.
        windows: that were to be tried.
        records: that were measured on.
    """

    measured: Measured
    costs: tuple[Cost, ...]
    layers: tuple[int, ...]
    windows: tuple[Window, ...]
    records: tuple[EvaluationRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Content of ``results.json``."""
        return self.measured.to_dict()


def locate(
    facts: Facts | None = None,
    model: str | Loaded = "factworld",
    method: str = "",
    hparams: str | Path | MoEHyperParams | None = None,
    out: str | Path | None = None,
    settings: LocateSettings | None = None,
    resume: bool = False,
    measure: bool = True,
    overrides: Mapping[str, Any] | None = None,
    on_cost: Callable[[Sequence[Cost]], Any] | None = None,
    progress: bool = True,
) -> Location:
    """Measure where a model holds facts; the model is bit-equal to before when this returns, or raises.

    Args:
        facts: a file (see `load_records`), or facts that were read; by default the bundled model's own records, or the
            neutral facts that ship.
        model: hub name, folder or "factworld", or a loaded model and its tokenizer.
        method: that trials edit by: one that solves for experts; by default that of a file of hparams, else Global.
        hparams: a YAML file, a folder of <METHOD>/<model>.yaml, or values; by default those that ship for the model.
            Their search of target vectors is what reachability is measured with.
        out: folder for ``results.json``, written after every row, and for target vectors. None writes nothing.
        settings: what is measured, and for how long.
        resume: take over the rows of an earlier run in ``out``.
        measure: False only says what it would cost.
        overrides: hyper-parameters by name, such as ``{"device": "cuda"}``.
        on_cost: is told the expected cost before anything is measured.
        progress: show progress bars.

    Raises:
        DataError: unusable facts, model or folder, or rows in ``out`` that are of something else. HyperParamsError,
            MethodError: see `locate_hparams`. LayerError: layers or windows that the model does not have. Further what
            an edit raises.
    """
    settings = settings or LocateSettings()
    if resume and out is None:
        raise DataError("There is nothing to go on with: --resume needs the folder --out of the earlier run.")
    with ExitStack() as stack:
        kept = stack.enter_context(temporary_folder()) if out is None else check_folder(out)
        job = _job(facts, model, (method, hparams, overrides or {}), settings, kept, progress)
        folder = None if out is None else Path(out)
        measured = Measured(job.provenance(model, facts), folder)
        if resume and folder is not None:
            measured = Measured.resumed(folder, measured.provenance)
        todo = job.todo(measured)
        expected = tuple(costs(job.load, job.settings, job.hparams, todo))
        if on_cost is not None:
            on_cost(expected)
        measured.left = {stage: len(units) for stage, units in todo.items()}
        if measure:
            _measure(job, measured)
    return Location(measured, expected, tuple(job.layers), tuple(job.windows), tuple(job.task.records))


@dataclass(frozen=True)
class _Job:
    """What is measured on what; one method per stage makes the rows of one unit."""

    task: Task
    hparams: SolverHyperParams
    settings: LocateSettings
    layers: list[int]
    windows: list[Window]
    kept: Path
    progress: bool

    @cached_property
    def view(self) -> MoELayerView:
        return MoELayerView(self.task.model)

    @cached_property
    def load(self) -> Workload:
        return Workload.of(self.view, self.task.tok, self.task.records, self.hparams, self.task.protocol)

    @cached_property
    def traced(self) -> CausalTracing:
        task, hp = self.task, self.hparams
        found = traced_facts(task.model, task.tok, task.records, hp.fact_token, hp.chat)
        return CausalTracing(self.view, task.tok, found, self.layers, self.settings.tracing)

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.view)

    def provenance(self, model: str | Loaded, facts: Facts | None) -> dict[str, Any]:
        """What the rows depend on: not the budget, the stages and the windows, so that a run can go on with others."""
        settings = asdict(replace(self.settings, budget=None, stages=STAGES))
        for name in ("budget", "stages", "layers", "skip", "widths", "windows"):
            del settings[name]
        named = isinstance(facts, (str, Path)) or facts is None
        return {
            "model": model_name(model),
            "model_fingerprint": self.fingerprint,
            "data": str(facts or default_facts(model)) if named else "given",
            "data_hash": corpus_hash([repr(record) for record in self.task.records]),
            "protocol": self.task.protocol,
            **self.task.provenance,
            **settings,
            "edits": len(self.task.records),
            "layers": self.layers,
            "hparams": self.hparams.to_dict(),
            "versions": versions(),
        }

    def todo(self, measured: Measured) -> dict[str, list[Unit]]:
        """Units of each stage that have no row yet."""
        wanted: dict[str, list[Unit]] = {
            "routing": [] if all(measured.has("routing", str(n)) for n in self.layers) else [0],
            "tracing": [n for n in self.layers if not measured.has("tracing", str(n))],
            "reachability": [n for n in self.layers if not measured.has("reachability", str(n))],
            "statistics": [
                chunk
                for chunk in statistics_chunks(self.hparams, self.windows)
                if not measured.has("statistics", window_name(chunk))
            ],
            "trial": [w for w in self.windows if not measured.has("trial", window_name(w))],
            "experts": [n for n in self.layers if not measured.has("experts", str(n))],
        }
        return {stage: wanted[stage] for stage in STAGES if stage in self.settings.stages}

    def run(self, stage: str, unit: Unit, measured: Measured) -> None:
        """Measure one unit and keep its rows."""
        if isinstance(unit, tuple):
            if stage == "statistics":
                self._gather(unit, measured)
            else:
                self._try(unit, measured)
        elif stage == "routing":
            hp = self.hparams
            for one in routing_alikeness(
                self.view, self.task.tok, self.task.records, self.layers, hp.fact_token, hp.chat
            ):
                measured.add(stage, str(one.layer), one)
        elif stage == "tracing":
            measured.add(stage, str(unit), self.traced.layer(unit))
        elif stage == "experts":
            found = [asdict(one) for one in self.traced.experts(unit)]
            measured.add(stage, str(unit), {"layer": unit, "experts": found})
        else:
            measured.add(stage, str(unit), self._reach(unit))

    def _reach(self, layer: int) -> Any:
        hp, task = self.hparams, self.task
        search = TargetSearch(
            self.view, task.tok, layer, tuple(hp.context_prefixes), TargetSettings.of(hp), self.progress, warn=False
        )
        return reachability(
            search,
            task.records,
            lambda one, requests: cached_targets(self._targets, hp.model_name, self.fingerprint, one, requests),
        )

    @property
    def _targets(self) -> str:
        return str(self.kept / "targets")

    def _gather(self, layers: Window, measured: Measured) -> None:
        hp = at_layers(self.hparams, layers, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)  # the row says how many tokens the experts have
            found = layer_statistics(self.view, self.task.tok, hp, layers, self.fingerprint, self.progress)
        least = {str(layer): int(moments.counts.min()) for layer, moments in found.items()}
        measured.add("statistics", window_name(layers), {"layers": list(layers), "least_tokens_per_expert": least})

    def _try(self, window: Window, measured: Measured) -> None:
        """Edit all facts at a window, score them, and put the model back; the unedited model is scored once."""
        name, hp = window_name(window), at_layers(self.hparams, window, self._targets)
        before = measured.rows["trial"].get(PRE_EDIT)
        values = {key: value for key, value in (before or {}).items() if key != "name"}
        earlier = [] if before is None else [row_of(values, self.task.protocol)]
        found = compare(self.task, [hp], labels=[name], earlier=earlier, progress=self.progress)
        for row in found.rows:
            values = row.to_dict()
            if row.method == PRE_EDIT:
                if before is None:
                    measured.add("trial", PRE_EDIT, values)
                continue
            values["hparams"]["target_cache_dir"] = self.hparams.target_cache_dir
            measured.add("trial", name, {"layers": list(window), **values})


def _job(
    facts: Facts | None,
    model: str | Loaded,
    chosen: tuple[str, str | Path | MoEHyperParams | None, Mapping[str, Any]],
    settings: LocateSettings,
    kept: Path,
    progress: bool,
) -> _Job:
    method, path, overrides = chosen
    hp = locate_hparams(model, method, path, overrides)
    source = default_facts(model) if facts is None else facts
    records, protocol, left_out = _records(source)
    net, tok = load(model, Loading.of(hp), progress)
    view = MoELayerView(net)
    layers = list(settings.layers) or sorted(view.layers)
    view.require(layers)
    trial = {"statistics", "trial"} & set(settings.stages)
    windows = windows_to_try(settings, layers, hp.layers) if trial else []
    screened = screen(fact_set(records), make_editor(at_layers(hp, layers[-1:], None)), tok)
    skip = default_skip(source) if settings.skip is None else settings.skip
    usable = screened.records[skip:]
    wanted = min(EDITS, len(usable)) if settings.edits is None else settings.edits
    if not usable or len(usable) < wanted:
        raise DataError(
            f"{hp.alg_name} can edit {len(screened.records)} of the facts; {skip} + {max(wanted, 1)} were asked for."
        )
    left_out += [(one.number, one.reason) for one in screened.refused]
    if left_out:
        logger.warning("%d facts are left out; the first, %d: %s", len(left_out), *left_out[0])
    about = {"skip": skip, "dtype": hp.dtype, "device": str(hp.device)}
    kept_records = answered(net, tok, usable[:wanted], hp.chat)
    task = Task(net, tok, kept_records, protocol, settings.batch_size, about, hp.chat)
    return _Job(task, hp, settings, layers, windows, kept, progress)


def _records(facts: Facts) -> tuple[list[EvaluationRecord], str, list[tuple[int, str]]]:
    """The facts, how they are judged, and what of a file can't be used."""
    if isinstance(facts, (str, Path)):
        found = load_records(facts)
        return list(found.records), found.protocol, list(found.skipped)
    given = facts if isinstance(facts, FactSet) else fact_set(facts)
    return list(given.facts), given.protocol, list(given.skipped)


def _measure(job: _Job, measured: Measured) -> None:
    """All that is left, stage by stage, as long as the next unit is expected to fit into the budget."""
    start, budget = time.perf_counter(), job.settings.budget
    todo = job.todo(measured)
    total = sum(len(units) for units in todo.values())
    with progress_bar(total, "locate", "step", job.progress) as bar:
        for stage, units in todo.items():
            took: list[float] = []
            for unit in _ordered(stage, units, measured, job.hparams.layers):
                begun = time.perf_counter()
                expected = sum(took) / len(took) if took else _expected(job, stage, unit)
                if budget is not None and begun - start + expected > 60 * budget:
                    break
                job.run(stage, unit, measured)
                synchronise()
                took.append(time.perf_counter() - begun)
                measured.seconds[stage] = measured.seconds.get(stage, 0.0) + took[-1]
                measured.left[stage] -= 1
                measured.save()
                bar.update(1)
    measured.save()


def _expected(job: _Job, stage: str, unit: Unit) -> float:
    return seconds_of(job.load, job.settings, job.hparams, stage, unit)


def _ordered(stage: str, units: Sequence[Any], measured: Measured, own: Sequence[int]) -> Sequence[Any]:
    """The windows that reachability promises most of first, so that a budget is spent on them.

    Where it was not measured, that of the hparams, ``own``, is first, then those whose last layer is near its last.
    """
    if stage != "trial":
        return units
    reach = measured.rows["reachability"].values()
    if not reach:
        return near(units, own)
    nll = {row["layer"]: (row["paraphrase_nll"]["mean"], row["final_nll"]["mean"]) for row in reach}
    return by_promise(units, {layer: final if other is None else other for layer, (other, final) in nll.items()})
