"""``edit``: a file of facts becomes a patch, and on request an edited checkpoint, with a report of what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.checkpoints.history import read_history
from easyedit_moe.checkpoints.staging import check_free, new_folder
from easyedit_moe.editors import Editor, EditResult, make_editor
from easyedit_moe.evaluation.generation import MAX_NEW_TOKENS, check_limit
from easyedit_moe.evaluation.neighbours import answered
from easyedit_moe.facts.chat import user_turn
from easyedit_moe.facts.records import EvaluationRecord, FactSet, load_facts
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.hub import find_source
from easyedit_moe.moe.loading import load_tokenizer
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.patches.checks import versions
from easyedit_moe.progress import progress_bar
from easyedit_moe.workflow.edit_outcome import Change, EditReport, FactReport
from easyedit_moe.workflow.measuring import Asked, Said, ask_all, prompts_of
from easyedit_moe.workflow.saving import chained, check_saved_kinds, save_edit
from easyedit_moe.workflow.screening import Screened, check_chat, fact_set, fitting, screen
from easyedit_moe.workflow.session import Loaded, Loading, load, model_name
from easyedit_moe.workflow.settings import settings_for, with_batch_size

Facts = str | Path | FactSet | Sequence[EditRequest | EvaluationRecord]


def edit(
    facts: Facts,
    model: str | Loaded = "factworld",
    method: str = "",
    hparams: str | Path | MoEHyperParams | None = None,
    out: str | Path | None = None,
    save: Sequence[str] = ("patch",),
    batch_size: int | None = None,
    keep_originals: bool = False,
    strict: bool = False,
    overrides: Mapping[str, Any] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: bool = True,
) -> EditReport:
    """Edit all facts into a model, in batches that follow each other, and see what it says before and after.

    The model in memory is edited when this returns; if anything raises, it is as before, and nothing is written. Files
    appear together: the patch (or MEMoE's adapter), on request the whole checkpoint, ``report.json`` and ``report.md``.

    Args:
        facts: a file (see `load_facts`), or facts that were read.
        model: hub name, folder or "factworld", or a loaded model and its tokenizer.
        method: name; by default that of a file of hparams, else Global.
        hparams: a YAML file, a folder of <METHOD>/<model>.yaml, or values; by default those that ship for the model.
        out: folder for the files; absent or empty. None writes nothing.
        save: of "patch" and "checkpoint".
        batch_size: facts that are solved together; by default that of the hparams.
        keep_originals: the patch holds what reverts it without the base checkpoint.
        strict: refuse the file if any of its facts can't be edited.
        overrides: hyper-parameters by name, such as ``{"device": "cuda", "lambda_reg": 10}``.
        max_new_tokens: most tokens of an answer.
        progress: show progress bars.

    Raises:
        DataError: unusable facts or model. HyperParamsError, MethodError: see `choose_hparams`. CheckpointError: a
            folder that is not free, or a checkpoint that can't be saved rightly. Further what the editor raises.
    """
    check_saved_kinds(save, out)
    check_limit(max_new_tokens)
    if out is not None:
        check_free(out)
    read = load_facts(facts, strict) if isinstance(facts, (str, Path)) else facts
    if not isinstance(read, FactSet):
        read = fact_set(read)
    settings = settings_for(model, method, hparams, with_batch_size(overrides, batch_size))
    editor, options = make_editor(settings, progress), Loading.of(settings)
    # What is wrong with the facts is said before the weights are read.
    tok = load_tokenizer(model, options.trust_remote_code) if isinstance(model, str) else model[1]
    check_chat(settings, tok)
    screened = screen(read, editor, tok, strict)
    net, tok = load(model, options, progress)
    screened = fitting(screened, editor, net, tok, strict)
    editor.prepare(net, tok)
    return _edited(screened, (model, net, tok), editor, options, out, save, keep_originals, max_new_tokens)


def _edited(
    screened: Screened,
    loaded: tuple[str | Loaded, nn.Module, PreTrainedTokenizerBase],
    editor: Editor,
    options: Loading,
    out: str | Path | None,
    save: Sequence[str],
    keep_originals: bool,
    max_new_tokens: int,
) -> EditReport:
    """Measure, edit, measure, write; the model is as before if any of it fails."""
    model, net, tok = loaded
    chat = editor.hparams.chat
    records = answered(net, tok, screened.records, chat)
    asked = [pair for record in records for pairs in prompts_of(record).values() for pair in pairs]
    before = ask_all(net, tok, asked, max_new_tokens, editor.progress, chat)
    results: list[EditResult] = []
    with intact(net) as hold:
        _edit_batches(net, tok, editor, screened.requests, results, parent_of(model), AppliedRun(net, hold))
        after = ask_all(net, tok, asked, max_new_tokens, editor.progress, chat)
        whole = chained([result.patch for result in results])
        report = EditReport(
            _fact_reports(records, screened.numbers, editor, before, after, results),
            screened.refused,
            screened.unit,
            tuple(dict.fromkeys(text for result in results for text in result.warnings)),
            _seconds(results),
            whole.id,
            (),
            _provenance(model, editor, options, max_new_tokens, tok),
            tuple(result.patch for result in results),
        )
        if out is None:
            return report
        with new_folder(Path(out)) as partial:
            return save_edit(report, whole, (model, net, tok), partial, Path(out), save, keep_originals)


def _edit_batches(
    net: nn.Module,
    tok: PreTrainedTokenizerBase,
    editor: Editor,
    requests: Sequence[EditRequest],
    results: list[EditResult],
    parent: str | None,
    run: AppliedRun,
) -> None:
    """Edit batch after batch; ``results`` grows, and so does the run, by which all of it is taken back."""
    size, memory = editor.hparams.batch_size, None
    with progress_bar(len(requests), "edits", "fact", editor.progress) as bar:
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            result = editor.edit(net, tok, batch, memory)
            result.patch.parent = parent
            results.append(result)
            run.add(result.patch)
            memory, parent = result.memory, result.patch.id
            bar.update(len(batch))


def _fact_reports(
    records: Sequence[EvaluationRecord],
    numbers: Sequence[int],
    editor: Editor,
    before: Mapping[Asked, Said],
    after: Mapping[Asked, Said],
    results: Sequence[EditResult],
) -> tuple[FactReport, ...]:
    size, found = editor.hparams.batch_size, []
    for place, (number, record) in enumerate(zip(numbers, records, strict=True)):
        changes = {
            kind: tuple(Change(*pair, before[pair], after[pair]) for pair in pairs)
            for kind, pairs in prompts_of(record).items()
        }
        diagnosis = results[place // size].diagnosis
        told = None if diagnosis is None else diagnosis.facts[place % size]
        found.append(
            FactReport(
                number,
                record.request,
                changes["fact"][0],
                changes["rephrasings"],
                changes["neighbours"],
                changes["portability"],
                place // size,
                None if told is None else told.final_nll,
                None if told is None else told.reached,
                None if told is None else told.residual_share,
            )
        )
    return tuple(found)


def _seconds(results: Sequence[EditResult]) -> dict[str, float]:
    total: dict[str, float] = {}
    for result in results:
        for stage, seconds in result.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def parent_of(model: str | Loaded) -> str | None:
    """The patch that lies on a checkpoint's folder last, by its history; None for a model that comes without one."""
    if not isinstance(model, str):
        return None
    edits = read_history(Path(find_source(model).name))
    return edits[-1].id if edits else None


def _provenance(
    model: str | Loaded, editor: Editor, options: Loading, max_new_tokens: int, tok: PreTrainedTokenizerBase
) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "method": editor.method,
        "hparams": editor.hparams.to_dict(),
        "loading": asdict(options),
        "max_new_tokens": max_new_tokens,
        **({"chat_turn": vars(user_turn(tok))} if editor.hparams.chat else {}),
        "versions": versions(),
    }
