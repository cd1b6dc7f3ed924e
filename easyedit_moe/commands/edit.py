"""``easyedit-moe edit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.compare import split_names
from easyedit_moe.commands.printing import note, say, show_rows
from easyedit_moe.commands.reporting import shows_progress
from easyedit_moe.commands.statistics_lines import statistics_lines

if TYPE_CHECKING:
    from easyedit_moe.workflow.edit_outcome import EditReport
    from easyedit_moe.workflow.preview import Preview

NO_CHANGE = 3
"""Exit code where no fact changed its answer."""


def edit(
    facts: Annotated[str, typer.Argument(metavar="FACTS", help="File of facts: .csv, .tsv, .json or .jsonl.")],
    out: Annotated[str, typer.Option(help="Folder for what is written; absent or empty.")],
    model: options.Model = "factworld",
    method: options.Method = "",
    hparams: options.HParams = None,
    save: Annotated[
        list[str] | None, typer.Option(help="What to save, with commas: patch, checkpoint or both; default: patch.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Facts per batch; default: that of the hparams.")] = None,
    keep_originals: Annotated[
        bool, typer.Option("--keep-originals", help="Let the patch hold what reverts it without the base checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check facts, settings and memory; read no weight, write nothing.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the file if any fact can't be edited.")] = False,
    chat: options.EditsInChat = False,
    settings: options.Settings = None,
    stats_dir: options.StatsDir = "",
    dtype: options.DType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer in the report.")] = 16,
) -> None:
    """Edit a file of facts into a model: writes a patch, on request the whole checkpoint, and a report.

    FACTS has the columns prompt, target_new and (for most methods) subject, and if you like ground_truth, rephrase,
    neighbours and portability. Exit code 3: no fact changed its answer.
    """
    kinds = split_names(save or ["patch"])
    given = options.settings_of(
        settings, stats_dir=stats_dir, dtype=dtype, device=device, trust_remote_code=trust_remote_code, chat=chat
    )
    if dry_run:
        from easyedit_moe.workflow.preview import preview

        _show_preview(
            preview(facts, model, method, hparams, out, kinds, batch_size, strict, given, max_new_tokens), out
        )
        return
    from easyedit_moe.workflow.edit import edit as run

    report = run(
        facts, model, method, hparams, out, kinds, batch_size, keep_originals, strict, given, max_new_tokens,
        shows_progress(),
    )  # fmt: skip
    _show(report)
    if not report.changed:
        raise typer.Exit(NO_CHANGE)


def _show(found: EditReport) -> None:
    from easyedit_moe.workflow.edit_report import COLUMNS, cells, summary

    show_rows(COLUMNS, [cells(fact) for fact in found.facts])
    _note_refused(found.refused, found.unit)
    say(summary(found))
    note("Written: " + ", ".join(str(path) for path in found.files))
    if not found.changed:
        note("No answer changed. Warnings and the residual that was reached (report.md) say why.")
    elif not found.written:
        note("No new target is written yet. Warnings and the residual that was reached (report.md) say why.")


def _show_preview(found: Preview, out: str) -> None:
    from easyedit_moe.workflow.edit_report import counted, short

    hp, batches = found.hparams, f"{found.batches} batch" + ("" if found.batches == 1 else "es")
    rows = [[str(n), short(r.prompt), str(r.subject or "-"), r.target_new]
            for n, r in zip(found.facts.numbers, found.facts.requests, strict=True)]  # fmt: skip
    show_rows((found.facts.unit, "prompt", "subject", "new target"), rows)
    _note_refused(found.facts.refused, found.facts.unit)
    say(f"{hp.alg_name} on {hp.model_name}: {counted(len(rows), 'fact')} in {batches}, layers "
        f"{', '.join(map(str, hp.layers))}, {hp.dtype} on {hp.device}.")  # fmt: skip
    say(f"Memory: {found.memory.peak / 1e9:.2f} GB at the peak, of which the model {_model(found.memory):.2f} GB.")
    for line in statistics_lines(found.statistics, hp):
        say(line)
    say(f"Nothing was written to {out}.")


def _note_refused(refused: Any, unit: str) -> None:
    for one in refused:
        note(f"refused, {unit} {one.number}: {one.reason}")


def _model(memory: Any) -> float:
    return float(memory.shapes.parameters) / 1e9
