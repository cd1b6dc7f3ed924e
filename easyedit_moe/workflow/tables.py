"""``tables``: the MoTE paper's tables for any model and data; rows are kept as they are done, for all tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from easyedit_moe import host
from easyedit_moe.comparison.compare import Comparison, compare
from easyedit_moe.comparison.paper_report import folder_of, write_overview, write_table
from easyedit_moe.comparison.papers import (
    COUNTERFACT,
    ZSRE,
    Line,
    PaperTable,
    find_tables,
    known_model,
    published_for,
)
from easyedit_moe.comparison.ready import READY
from easyedit_moe.comparison.report import check_folder
from easyedit_moe.comparison.rows import PRE_EDIT, Row
from easyedit_moe.comparison.saved import earlier_rows, save_rows
from easyedit_moe.comparison.settings import AnyHyperParams, has_file, loading_settings, resolve_rows
from easyedit_moe.comparison.task import Task, load_task, with_data
from easyedit_moe.comparison.tuned import check_held_out
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import presets
from easyedit_moe.storage.strict_json import json_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeTable:
    """A table on one data set.

    Attributes:
        table: its definition.
        comparison: its rows.
        files: ``results.json``, ``table.md`` and a chart.
    """

    table: PaperTable
    comparison: Comparison
    files: tuple[Path, ...]


def tables(
    names: Sequence[str],
    model: str = "factworld",
    data: str = "factworld",
    zsre: str | None = None,
    edits: int = 100,
    batch_size: int = 50,
    hparams: str | Path | None = None,
    out: str | Path = "results/tables",
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    on_row: Callable[[Row], None] | None = None,
    progress: bool = True,
    skip: int = 0,
) -> list[MadeTable]:
    """Make tables of the paper, each in a folder of its own under ``out``; ``tables.md`` has all that are there.

    EasyEdit's methods are left out where EasyEdit is not there or has no hparams for the model; the table says so. Rows
    with the same settings are made once for all tables that give methods their targets alike.

    Args:
        names: see `easyedit_moe.comparison.papers.TABLES`.
        model: hub name, folder or "factworld".
        data: records to edit and judge: a file of CounterFact, or any other.
        zsre: a file of ZsRE for table 1, which is made without it where there is none.
        edits: records of each file.
        batch_size: edits per batch; batches follow each other.
        hparams: folder of <METHOD>/<model>.yaml; methods without a file in it have those that ship.
        out: folder for all results.
        resume: go on after an interruption: rows in ``out`` that would come out again are kept.
        overrides: hyper-parameters by name, which count more than the files, but not more than what defines a row.
        seeds: see `easyedit_moe.comparison.compare.compare`.
        on_row: called with each row when it is made.
        progress: show bars.
        skip: records of ``data`` to leave out at the start, such as those that settings were chosen on.

    Raises:
        DataError: an unknown table, unusable data or model, or a folder that can't be written to or gone on with.
        HyperParamsError: hparams that do not fit. Further what editors raise.
    """
    wanted = find_tables(names)
    given = {**(overrides or {}), "model_name": model}
    plans = [_plan(table, model, hparams, given) for table in wanted]
    _tell_of_shipped(plans, model, hparams)
    folder = check_folder(out)
    task = _task(plans, model, data, (edits, skip), batch_size, given, progress)
    tasks = {COUNTERFACT: task}
    if zsre is not None and any(ZSRE in table.data for table in wanted):
        tasks[ZSRE] = with_data(task, zsre, edits)
    for one in tasks.values():
        check_held_out(hparams, one.records)
    run = _Run(folder, resume, tuple(seeds), on_row, progress)
    made = [run.make(plan, tasks[name], name) for plan in plans for name in plan.table.data if name in tasks]
    write_overview(folder)
    return made


@dataclass(frozen=True)
class _Plan:
    """A table's rows that can be made, with their settings, and a line for each that can't."""

    table: PaperTable
    labels: list[str]
    settings: list[AnyHyperParams]
    left_out: list[str]


def _plan(table: PaperTable, model: str, folder: str | Path | None, given: Mapping[str, Any]) -> _Plan:
    if folder is not None and not Path(folder).is_dir():
        raise HyperParamsError(f"Tables have rows of many methods: --hparams must be a folder; found {folder}.")
    reasons = {line.label: _missing(line, model, folder) for line in table.lines}
    lines = [line for line in table.lines if not reasons[line.label]]
    rows = [(line.method, _place(line.method, model, folder), {**given, **line.changes}) for line in lines]
    left_out = [reason for reason in reasons.values() if reason]
    return _Plan(table, [line.label for line in lines], resolve_rows(rows, model), left_out)


def _missing(line: Line, model: str, folder: str | Path | None) -> str:
    """Why a method of EasyEdit's can't be run here; empty where it can, and for methods of ours."""
    if presets.find_method(line.method).host_name is None:
        return ""
    if not host.is_available():
        return f"{line.label}: EasyEdit is not installed, nor does EASYEDIT_HOME name a checkout of it."
    if not has_file(line.method, model, folder) and not has_file(line.method, model):
        return f"{line.label}: there is no hparams file of EasyEdit's {line.method} for {model}."
    return ""


def _tell_of_shipped(plans: Sequence[_Plan], model: str, folder: str | Path | None) -> None:
    """Say which methods of the rows that are made the user's folder has nothing for."""
    methods = dict.fromkeys(line.method for plan in plans for line in plan.table.lines if line.label in plan.labels)
    lacking = [method for method in methods if folder is not None and not has_file(method, model, folder)]
    if lacking:
        logger.warning("%s has no file for %s on %s: they have what ships.", folder, ", ".join(lacking), model)


def _place(method: str, model: str, folder: str | Path | None) -> str | Path | None:
    """The user's folder where it has this method, else None for the files that ship."""
    return folder if folder is not None and has_file(method, model, folder) else None


def _task(
    plans: Sequence[_Plan], model: str, data: str, which: tuple[int, int], batch_size: int, given: Mapping[str, Any],
    progress: bool,
) -> Task:  # fmt: skip
    settings = [one for plan in plans for one in plan.settings]
    first = loading_settings(settings, model)
    return load_task(
        model, data, *which, batch_size, given.get("dtype") or first.dtype, given.get("device", first.device),
        first.model_parallel, first.trust_remote_code, progress, any(getattr(hp, "chat", False) for hp in settings),
    )  # fmt: skip


@dataclass
class _Run:
    """Makes tables one after the other, and remembers their rows."""

    folder: Path
    resume: bool
    seeds: tuple[int, ...]
    on_row: Callable[[Row], None] | None
    progress: bool
    _rows: dict[tuple[str, bool], list[Row]] = field(default_factory=dict)

    def make(self, plan: _Plan, task: Task, data: str) -> MadeTable:
        """One table on one data set; its rows are on disk as they are done."""
        table = plan.table
        place = folder_of(table, data, self.folder)
        task = replace(task, provenance={**task.provenance, **_about(table, task)})
        rows = self._earlier(plan, task, data, place)

        def told(result: Comparison) -> Comparison:
            return replace(result, provenance={**result.provenance, "left_out": plan.left_out})

        result = compare(
            task, plan.settings, self.on_row, plan.labels, False, rows, lambda so_far: save_rows(told(so_far), place),
            self.progress, table.ready_targets, self.seeds,
        )  # fmt: skip
        self._rows.setdefault((data, table.ready_targets), []).extend(result.rows)
        return MadeTable(table, told(result), tuple(write_table(told(result), place)))

    def _earlier(self, plan: _Plan, task: Task, data: str, place: Path) -> list[Row]:
        """Rows that need not be made again: of the interrupted run, and of tables that were made before this one."""
        about = {**task.provenance, **({READY: True} if plan.table.ready_targets else {})}
        found = earlier_rows(place, about, plan.labels) if self.resume else []
        if found:
            logger.info("Going on after %d rows of %s: %s.", len(found), place, ", ".join(row.method for row in found))
        known = self._rows.get((data, plan.table.ready_targets), [])
        names = [PRE_EDIT, *plan.labels]
        settings: list[dict[str, Any]] = [{}, *(hp.to_dict() for hp in plan.settings)]
        for name, values in zip(names, settings, strict=True):
            same = next((row for row in known if json_text(row.hparams) == json_text(values)), None)
            if same is not None:
                found.append(replace(same, method=name))
        return found


def _about(table: PaperTable, task: Task) -> dict[str, Any]:
    """What a table's provenance says besides the task's."""
    request = task.records[0].request
    model = known_model(task.provenance["model"])
    found = published_for(table, task.provenance, model, (request.prompt, request.target_new))
    return {"table": table.name, "published": None if found is None else found.to_dict()}
