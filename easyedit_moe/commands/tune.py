"""``easyedit-moe tune``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import note, say, show_rows
from easyedit_moe.commands.reporting import shows_progress

if TYPE_CHECKING:
    from easyedit_moe.workflow.tune import Trial, Tuned


def tune(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Held-out records, not those to be reported.")],
    out: Annotated[str, typer.Option(help="Folder for hparams.yaml and tuning.json; absent or empty.")],
    model: options.Model = "factworld",
    method: options.Method = "",
    hparams: options.HParams = None,
    edits: Annotated[int, typer.Option(help="Number of records to edit.")] = 50,
    skip: Annotated[int, typer.Option(help="Number of records to leave out at the start.")] = 0,
    budget: Annotated[float, typer.Option(help="Minutes; a trial is begun only if it should end within them.")] = 30.0,
    chat: options.EditsInChat = False,
    settings: options.Settings = None,
    stats_dir: options.StatsDir = "",
    dtype: options.DType = "",
    device: options.Device = "",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Try a few settings of a method on held-out records, and keep the best by utility.

    Lambda, the search of target vectors, null space, learning rate, steps and layers are varied one after the other.
    compare refuses to score the result on the records that were used.
    """
    from easyedit_moe.workflow.tune import tune as run

    given = options.settings_of(
        settings, stats_dir=stats_dir, dtype=dtype, device=device, trust_remote_code=trust_remote_code, chat=chat
    )
    found = run(data, model, method, hparams, out, edits, skip, budget, given, _tell, shows_progress())
    _show(found)


def _tell(trial: Trial) -> None:
    utility = f"utility {trial.utility:.1f}" if trial.scores else f"failed: {trial.error}"
    note(f"{_changes(trial)}: {utility}, {trial.seconds:.0f} s")


def _changes(trial: Trial) -> str:
    return ", ".join(f"{name} {value}" for name, value in trial.changes.items()) or "as it was"


def _show(found: Tuned) -> None:
    names = ("efficacy", "generalisation", "specificity", "utility")
    rows = [["", "unedited", *(_score(found.unedited[name]) for name in names), ""]]
    for trial in found.trials:
        scores = [_score(trial.scores[name]) if trial.scores else "-" for name in names]
        rows.append(["best" if trial is found.best else "", _changes(trial), *scores, f"{trial.seconds:.0f}"])
    show_rows(("", "settings", *names, "seconds"), rows)
    first = found.trials[0].scores["utility"]
    gain, noise = found.best.utility - first[0], first[1]
    if 0 < gain < noise:
        say(f"The gain of {gain:.1f} points is less than the standard error of {noise:.1f}: it may be chance.")
    if found.left_out:
        note(f"The budget left {len(found.left_out)} settings untried; --budget gives more minutes.")
    note("Written: " + ", ".join(str(path) for path in found.files))


def _score(score: tuple[float, float]) -> str:
    return f"{score[0]:.1f} ± {score[1]:.1f}"
