"""``tune``: a few settings of a method tried on held-out facts, one after the other, by utility, within a budget."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from easyedit_moe.checkpoints.staging import check_free, new_folder
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.rows import PRE_EDIT, Row
from easyedit_moe.comparison.task import Task, load_task
from easyedit_moe.comparison.tuned import TUNING, record_hash
from easyedit_moe.editors.proposal import yaml_line
from easyedit_moe.editors.registry import editor_class
from easyedit_moe.errors import DataError, EditingError, HyperParamsError
from easyedit_moe.hparams import MoEHyperParams, presets
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.files import temporary_folder, write_text
from easyedit_moe.storage.strict_json import write_checked_json
from easyedit_moe.workflow.settings import choose_hparams

Change = Mapping[str, Any]

_FACTORS: Mapping[str, tuple[float, ...]] = {
    "lambda_reg": (0.1, 10.0),
    "lambda_relative": (0.1, 10.0),
    "v_num_grad_steps": (2,),
    "v_lr": (2.0,),
    "clamp_norm_factor": (0.5, 2.0, 4.0),
    "lr": (0.3, 3.0),
    "num_steps": (2,),
    "optim_num_step": (2,),
    "steps": (2,),
}
"""What a setting is multiplied by, one factor a trial."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        axis: what was varied; "start" for the settings that were there.
        changes: against those, by name.
        scores: "efficacy", "generalisation", "specificity" and "utility" -> mean and standard error in percent; empty
            where the edit failed.
        seconds: that it took.
        error: why it failed.
    """

    axis: str
    changes: dict[str, Any]
    scores: dict[str, tuple[float, float]]
    seconds: float
    error: str = ""

    @property
    def utility(self) -> float:
        """What is compared; below every score where the edit failed."""
        return self.scores["utility"][0] if self.scores else -1.0


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        hparams: the best of those tried.
        best: their trial; the first of equals.
        trials: all, in their order; the first is of the settings that were there.
        unedited: scores before any edit.
        left_out: settings that the budget left untried.
        files: that were written.
    """

    hparams: MoEHyperParams
    best: Trial
    trials: tuple[Trial, ...]
    unedited: dict[str, tuple[float, float]]
    left_out: tuple[Change, ...]
    files: tuple[Path, ...] = ()


def tune(
    data: str,
    model: str = "factworld",
    method: str = "",
    hparams: str | Path | MoEHyperParams | None = None,
    out: str | Path | None = None,
    edits: int = 50,
    skip: int = 0,
    budget: float = 30.0,
    overrides: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    progress: bool = True,
) -> Tuned:
    """Try settings around those that are there, axis by axis, and keep the best by utility on held-out records.

    Each axis (`axes`) starts from the best so far. The model is bit-equal to before after each trial. `compare` refuses
    to score the tuned file on the records that were used here.

    Args:
        data: a file of records with what they are judged by, such as the true answer and neighbours, or "factworld";
            not the records that are to be reported.
        model: hub name, folder or "factworld".
        method: of ours; by default that of a file of hparams, else Global.
        hparams: to start from, see `choose_hparams`.
        out: folder for ``hparams.yaml`` and ``tuning.json`` (all trials); absent or empty. None writes nothing.
        edits: records to edit.
        skip: records to leave out at the start.
        budget: minutes, loading left out; a trial is begun only if it should end within it. The first always runs.
        overrides: hyper-parameters by name.
        on_trial: called with each trial when it is done.
        progress: show bars.

    Raises:
        DataError: unusable data or model. CheckpointError: a folder that is not free. HyperParamsError: no budget;
            further see `choose_hparams`. Further what the editor raises for the settings that are there.
    """
    if not budget > 0:
        raise HyperParamsError(f"The budget must be greater than 0 minutes; found {budget}.")
    if out is not None:
        check_free(out)
    start = choose_hparams(method, model, hparams, overrides)
    task = load_task(
        model, data, edits, skip, start.batch_size, start.dtype, start.device, start.model_parallel,
        start.trust_remote_code, progress, start.chat,
    )  # fmt: skip
    with temporary_folder() as cache:
        search = _Search(task, start, str(cache), 60 * budget, on_trial, progress)
        found = search.run()
    if out is None:
        return found
    with new_folder(Path(out)) as partial:
        _write(found, start, task, data, partial)
    return Tuned(**{**vars(found), "files": tuple(Path(out) / name for name in ("hparams.yaml", TUNING))})


def axes(hparams: MoEHyperParams, num_layers: int, usable: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """What is tried for each axis, as changes to these hyper-parameters: lambda, the search of target vectors, the null
    space, and learning rate and steps of methods that train; then layers, which show a difference only where the rest
    lets an edit through. What defines the method is left alone.
    """
    values, fixed = hparams.to_dict(), presets.METHODS[hparams.alg_name]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, factors in _FACTORS.items():
        if name in values:
            found[name] = [{name: _rounded(values[name] * factor)} for factor in factors if values[name]]
    if values.get("metric") == "nullspace":
        found["null space"] = _null_spaces(values) + ([] if "metric" in fixed else [{"metric": "identity"}])
    found["layers"] = [{"layers": window} for window in _windows(hparams.layers, num_layers, usable)]
    changed = {axis: [one for one in tried if not set(one) & set(fixed)] for axis, tried in found.items()}
    return {axis: tried for axis, tried in changed.items() if tried}


def _null_spaces(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Smaller and larger null spaces than these settings say, in their own terms."""
    energy, rank, threshold = (values[f"nullspace_{name}"] for name in ("energy", "rank", "threshold"))
    if energy is not None:
        return [{"nullspace_energy": _rounded(1 - (1 - energy) * factor)} for factor in (0.1, 3.0) if energy < 1]
    if rank is not None:
        if isinstance(rank, float):  # beyond two thirds, half of what is left instead of half as much again
            other: list[float] = [_rounded(rank / 2), _rounded(min(1.5 * rank, (1 + rank) / 2))]
        else:
            other = [max(1, round(rank * factor)) for factor in (0.5, 1.5)]
        return [{"nullspace_rank": one} for one in other if one != rank]
    relative = values["nullspace_relative"]
    scaled = [_rounded(threshold * factor) for factor in (0.1, 10.0)]
    tried: list[dict[str, Any]] = [{"nullspace_threshold": t} for t in scaled if t > 0 and not (relative and t > 1)]
    if not relative:
        tried.append({"nullspace_threshold": 0.01, "nullspace_relative": True})
    return tried


def _windows(layers: Sequence[int], num_layers: int, usable: Sequence[int]) -> list[list[int]]:
    """The window of layers moved down and up by half its width, and without its first and its last layer."""
    below = [layer for layer in sorted(usable) if layer < num_layers - 1]
    inside = [below.index(layer) for layer in layers if layer in below]
    if not inside:
        return []
    low, high, step = inside[0], inside[-1], max(1, len(inside) // 2)
    tried = [(low - step, high - step), (low + step, high + step)]
    if high > low:
        tried += [(low + 1, high), (low, high - 1)]
    windows = [below[a : b + 1] for a, b in tried if a >= 0 and b < len(below)]
    return [window for window in windows if window != list(layers)]


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


class _Search:
    def __init__(
        self, task: Task, start: MoEHyperParams, cache: str, seconds: float, on_trial: Callable[[Trial], None] | None,
        progress: bool,
    ) -> None:  # fmt: skip
        self.task, self.start, self.seconds, self.on_trial, self.progress = task, start, seconds, on_trial, progress
        self.cache = {"target_cache_dir": cache} if hasattr(start, "target_cache_dir") else {}
        self.trials: list[Trial] = []
        self.left_out: list[Change] = []
        self.unedited: list[Row] = []

    def run(self) -> Tuned:
        """All trials that the budget allows."""
        began = time.perf_counter()
        best = self._tried("start", {}, strict=True)
        view = MoELayerView(self.task.model, site=getattr(self.start, "site", EXPERTS))
        usable = editor_class(self.start.alg_name).editable_layers(view)
        for axis in axes(self.start, view.num_layers, usable):
            around = axes(self._with(best.changes), view.num_layers, usable).get(axis, [])
            for change in around:
                changes = {**best.changes, **change}
                spent, longest = time.perf_counter() - began, max(trial.seconds for trial in self.trials)
                if spent + longest > self.seconds:
                    self.left_out.append(changes)
                    continue
                trial = self._tried(axis, changes)
                if trial.utility > max(one.utility for one in self.trials[:-1]):
                    best = trial
        scores = _scores(self.unedited[0])
        return Tuned(self._with(best.changes), best, tuple(self.trials), scores, tuple(self.left_out))

    def _with(self, changes: Change) -> MoEHyperParams:
        return type(self.start).from_dict({**self.start.to_dict(), **changes}, "tune")

    def _tried(self, axis: str, changes: dict[str, Any], strict: bool = False) -> Trial:
        """One trial; an edit that fails is one of them, unless ``strict``."""
        began = time.perf_counter()
        scores, error = {}, ""
        try:
            hparams = self._with({**changes, **self.cache})
            rows = compare(self.task, [hparams], earlier=self.unedited, progress=self.progress).rows
            self.unedited = [row for row in rows if row.method == PRE_EDIT]
            scores = _scores(rows[-1])
        except EditingError as failure:
            if strict:
                raise
            error = str(failure)
        trial = Trial(axis, changes, scores, time.perf_counter() - began, error)
        self.trials.append(trial)
        if self.on_trial:
            self.on_trial(trial)
        return trial


def _scores(row: Row) -> dict[str, tuple[float, float]]:
    names = ("efficacy", "generalisation", "specificity", "utility")
    found = {name: getattr(row.scores, name) for name in names}
    if not found["utility"].count:
        raise DataError("The records lack what utility needs (rephrasings and neighbours); tune on others.")
    return {name: (score.mean, score.stderr) for name, score in found.items()}


def _write(found: Tuned, start: MoEHyperParams, task: Task, data: str, folder: Path) -> None:
    first, best = found.trials[0], found.best
    before, after = (f"{mean:.1f} ± {error:.1f}" for mean, error in (first.scores["utility"], best.scores["utility"]))
    where = f"records {task.provenance['skip']}-{task.provenance['skip'] + len(task.records) - 1} of {data}"
    head = [
        f"{start.alg_name} on {start.model_name}, tuned by `easyedit-moe tune` on {where} in {len(found.trials)} "
        f"trials: utility {after}, before {before}.",
        f"Report no score on those records: the best of several trials flatters itself there. {TUNING} beside this "
        "file has them, and all trials; `compare` refuses them.",
    ]
    lines = [f"# {line}" for text in head for line in textwrap.wrap(text, 118)]
    values = found.hparams.to_dict()
    defaults = {item.name: item.default for item in fields(type(start))}
    fixed = presets.METHODS[start.alg_name]
    lines.append(yaml_line("alg_name", start.alg_name))
    for name, value in values.items():
        if name in best.changes:
            lines.append(yaml_line(name, value, f"ours: tuned, before {start.to_dict()[name]}"))
        elif name != "alg_name" and name not in fixed and value != defaults[name] and value != []:
            lines.append(yaml_line(name, value, "as it was before tuning"))
    write_text(folder / "hparams.yaml", "\n".join(lines) + "\n")
    content = {
        "schema": 1,
        "kind": "tuning",
        "records": [record_hash(record) for record in task.records],
        "unedited": found.unedited,
        "trials": [asdict(trial) for trial in found.trials],
        "best": best.changes,
        "left_out": list(found.left_out),
        "start": start.to_dict(),
        "provenance": task.provenance,
    }
    write_checked_json(folder / TUNING, content)
