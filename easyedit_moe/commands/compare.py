"""``easyedit-moe compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from easyedit_moe.commands import compare_options as given
from easyedit_moe.commands import options
from easyedit_moe.commands.printing import note, say, show_table
from easyedit_moe.commands.reporting import shows_progress

if TYPE_CHECKING:
    from easyedit_moe.comparison.compare import Comparison
    from easyedit_moe.comparison.rows import Row
    from easyedit_moe.comparison.settings import AnyHyperParams
    from easyedit_moe.comparison.task import Task
    from easyedit_moe.evaluation.real_answers import RealAnswers


def compare(
    more: given.More = None,
    model: options.Model = "factworld",
    data: given.Data = "factworld",
    methods: given.Methods = None,
    edits: given.Edits = 100,
    skip: given.Skip = 0,
    batch_size: given.BatchSize = 50,
    hparams: given.HParams = None,
    out: given.Out = "results",
    dtype: given.DType = "",
    device: options.Device = "",
    stats_dir: options.StatsDir = "",
    easyedit_metrics: given.EasyEditMetrics = None,
    chat: options.EditsInChat = False,
    protocol: options.Protocol = "",
    seeds: given.Seeds = "",
    retention: given.Retention = False,
    answers: given.Answers = False,
    judge: given.Judge = "",
    judge_model: given.JudgeModel = "",
    resume: given.Resume = False,
) -> None:
    """Edit the same records by several methods and print a side-by-side table, scored after all edits."""
    from easyedit_moe import host
    from easyedit_moe.comparison.report import check_folder, notes, tables, write_results
    from easyedit_moe.comparison.settings import chosen_methods, loading_settings, method_files, resolve_methods
    from easyedit_moe.comparison.task import load_task
    from easyedit_moe.comparison.tuned import check_held_out
    from easyedit_moe.host.baseline_hparams import HOST_METHODS

    by_seed, real = read_seeds(seeds), read_judge(answers, judge, judge_model)
    names = chosen_methods(split_names([*(methods or []), *(more or [])]), hparams)
    overrides = options.settings_of(None, device=device, dtype=dtype, stats_dir=stats_dir, chat=chat)
    settings = resolve_methods(names, model, hparams, {**overrides, "model_name": model})
    folder = check_folder(out)
    if easyedit_metrics is None:
        easyedit_metrics = any(name in HOST_METHODS for name in names)
    if easyedit_metrics:
        host.load()
    first = loading_settings(settings, model)
    task = load_task(
        model, data, edits, skip, batch_size, dtype or first.dtype, device or first.device, first.model_parallel,
        first.trust_remote_code, shows_progress(), any(getattr(hp, "chat", False) for hp in settings), protocol or None,
    )  # fmt: skip
    check_held_out(hparams, task.records, method_files(names, model, hparams))
    task = task.asking(retention, real)
    result = _run(task, settings, folder, easyedit_metrics, resume, by_seed)
    paths = write_results(result, folder)
    for table in tables(result):
        show_table(table)
    for line in notes(result):
        say(line)
    note("Written: " + ", ".join(str(path) for path in paths))


def _run(
    task: Task,
    settings: list[AnyHyperParams],
    folder: Path,
    easyedit_metrics: bool,
    resume: bool,
    seeds: list[int],
) -> Comparison:
    """The comparison, each of whose rows is on disk once it is done."""
    from easyedit_moe.comparison.compare import compare as run
    from easyedit_moe.comparison.saved import earlier_rows, save_rows

    earlier = earlier_rows(folder, task.provenance, [hp.alg_name for hp in settings]) if resume else []
    done = [row.method for row in earlier]

    def told(row: Row) -> None:
        done.append(row.method)
        note(f"{row.method}: {brief(row)}")

    def keep(so_far: Comparison) -> None:
        save_rows(so_far, folder)

    if earlier:
        note(f"Going on after {len(earlier)} rows of {folder}: {', '.join(done)}.")
    try:
        return run(task, settings, told, (), easyedit_metrics, earlier, keep, shows_progress(), seeds=seeds)
    except BaseException:
        if done:
            note(f"Rows that are done are in {folder}; the same command with --resume goes on after them.")
        raise


def split_names(names: list[str]) -> list[str]:
    """Names that are separated by spaces (one each) or by commas."""
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def read_seeds(text: str) -> list[int]:
    """Whole numbers that are separated by commas.

    Raises:
        HyperParamsError: something else, or a number twice.
    """
    from easyedit_moe.errors import HyperParamsError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise HyperParamsError(f"--seeds takes different whole numbers, such as 0,1,2; found {text!r}.")
    return [int(part) for part in parts]


def read_judge(answers: bool, url: str, model: str) -> RealAnswers | None:
    """How real answers are asked for; None where they are not.

    Raises:
        JudgeError: half of a judge, or an address that is none.
    """
    from easyedit_moe.errors import JudgeError
    from easyedit_moe.evaluation.judge import EndpointJudge
    from easyedit_moe.evaluation.real_answers import RealAnswers

    if bool(url) != bool(model):
        raise JudgeError("A judge needs both --judge URL and --judge-model NAME.")
    if not url:
        return RealAnswers() if answers else None
    return RealAnswers(judge=EndpointJudge(url, model, os.environ.get("OPENAI_API_KEY", "")), judge_name=model)


def brief(row: Row) -> str:
    """A row's scores in one line, shown when the method is done."""
    scores = row.scores
    return (
        f"efficacy {scores.efficacy.mean:.1f}, generalisation {scores.generalisation.mean:.1f}, "
        f"specificity {scores.specificity.mean:.1f}"
    )
