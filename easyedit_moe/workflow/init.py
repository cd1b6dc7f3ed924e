"""``init``: hyper-parameters for a model that has none, chosen from its config, each with its reason.

Its layers can be those that edit best in trials, see `easyedit_moe.workflow.locate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from easyedit_moe.comparison.rows import PRE_EDIT
from easyedit_moe.comparison.tuned import record_hash, rows_file
from easyedit_moe.editors.proposal import Chosen, Proposal
from easyedit_moe.editors.proposing import edits_one_layer, propose
from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import FactSet, load_facts
from easyedit_moe.hparams import SolverHyperParams, presets
from easyedit_moe.hparams.sites import EXPERTS
from easyedit_moe.storage.files import check_writable, path_of, replacing, writing
from easyedit_moe.storage.strict_json import json_text
from easyedit_moe.workflow import locate as locating
from easyedit_moe.workflow.locate_cost import Cost
from easyedit_moe.workflow.locate_report import tried, verdict
from easyedit_moe.workflow.locate_settings import LocateSettings
from easyedit_moe.workflow.settings import DEFAULT_METHOD

STAGES = ("statistics", "trial")
"""What is measured of `locate`: the rest would spend the budget, and the trial alone decides."""


def init(
    model: str,
    method: str = "",
    data: str | Path | FactSet | None = None,
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    locate: bool = False,
    budget: float | None = None,
    on_cost: Callable[[Sequence[Cost]], Any] | None = None,
    progress: bool = True,
    site: str = EXPERTS,
) -> Proposal:
    """Choose hyper-parameters and write them as a commented YAML; no weight is read unless layers are located.

    Args:
        model: hub name, folder or "factworld".
        method: of ours; by default Global.
        data: facts that will be edited: a file (see `load_facts`), or facts that were read. Layers are located on them,
            by default on those that `locate` takes.
        out: the YAML file; None writes none.
        trust_remote_code: let code that comes with the checkpoint run.
        force: write over files that are there.
        locate: edit at windows of layers, and take the window of the best utility instead of layers by depth; a method
            that does not solve for experts takes Global's. The rows are written beside ``out``, see `rows_file`, and
            `compare` refuses to score the file on the records that decided. Statistics that were gathered stay in the
            cache whatever happens.
        budget: minutes for that, loading left out; layers are by depth where no window could be tried.
        on_cost: is told the expected cost before anything is measured.
        progress: show progress bars of what is measured.
        site: what is edited in the layers, see `easyedit_moe.hparams.sites`; only routed experts are located.

    Raises:
        DataError: no config by this name, unusable facts, a budget that is none, or a file that is there. WriteError:
            a file that can't be written. MethodError: an unknown method, or EasyEdit's own. LayoutError,
            DenseModelError: no experts that can be edited. Further what `locate` raises. Then nothing is written.
    """
    _check_choices(locate, budget, site)
    settings = LocateSettings(stages=STAGES, budget=budget)
    files = [] if out is None else [path_of(out, "the YAML file", DataError), *([rows_file(out)] if locate else [])]
    for file in files:
        _check_free(file, force)
    facts = load_facts(data) if isinstance(data, (str, Path)) else data
    found = propose(model, method or DEFAULT_METHOD, facts, trust_remote_code, site=site)
    found.hparams()
    texts: list[str] = []
    if locate:
        trial = _trial_hparams(found, facts, trust_remote_code)
        if edits_one_layer(found.method) or presets.find_method(found.method).depth == "last":
            settings = replace(settings, widths=(1,))
        where = str(data) if isinstance(data, Path) else data
        location = locating.locate(where, model, "", trial, None, settings, on_cost=on_cost, progress=progress)
        layers = _layers_of(location, found, budget, files[-1].name if files else "")
        found = _with_measured(propose(model, found.method, facts, trust_remote_code, layers=layers), location)
        texts = [json_text({**location.to_dict(), "records": _deciding(location)})]
    _write(files, [found.yaml(), *texts])
    return found


def _check_choices(locate: bool, budget: float | None, site: str) -> None:
    if budget is not None and not locate:
        raise DataError(f"A budget of {budget:g} minutes bounds what is measured; pass --locate with it.")
    if locate and site != EXPERTS:
        raise DataError(f"Layers are located for routed experts only; found site {site}. Leave out --locate.")


def _check_free(path: Path, force: bool) -> None:
    """Before anything is measured: DataError for a path that is taken, WriteError for one that can't be written."""
    check_writable(path)
    if os.path.lexists(path) and not (force and path.is_file()):
        raise DataError(
            f"{path} exists already; choose another name" + ("." if path.is_dir() else ", or pass --force.")
        )


def _write(files: Sequence[Path], texts: Sequence[str]) -> None:
    """All of them or none."""
    with ExitStack() as stack:
        partial = [stack.enter_context(replacing(file)) for file in files]
        for path, file, text in zip(files, partial, texts, strict=False):
            with writing(path, file):
                file.write_text(text, encoding="utf-8")


def _trial_hparams(found: Proposal, facts: FactSet | None, trust_remote_code: bool) -> SolverHyperParams:
    """What trials edit with: the proposal itself, or Global's at its layers where a method has no target vectors."""
    own = found.hparams()
    if isinstance(own, SolverHyperParams):
        return own
    instead = propose(found.model, DEFAULT_METHOD, facts, trust_remote_code).hparams({"layers": own.layers})
    return cast(SolverHyperParams, instead)


def _layers_of(location: locating.Location, found: Proposal, budget: float | None, rows: str) -> Chosen:
    """The best window that was tried, or the layers by depth; the reason says what was measured."""
    measured = location.measured
    kept = f"; rows: {rows}" if rows else "; the rows were not kept, as there is no --out"
    ranked = tried(measured.rows["trial"])
    if not ranked:
        default = next(one for one in found.values if one.name == "layers")
        limit = "" if budget is None else f" within the budget of {budget:g} min"
        return Chosen("layers", default.value, f"{default.reason}; by depth, as no window could be tried{limit}{kept}")
    best, before = ranked[0], measured.rows["trial"][PRE_EDIT]
    score, about = best["utility"], measured.provenance
    facts = f"fact{'' if score['count'] == 1 else 's'}"
    facts = f"given {facts}" if about["data"] == "given" else f"{facts} of {about['data']}"
    reason = (
        f"measured: window {best['name']} has utility {score['mean']:.1f} ± {score['stderr']:.1f} in a trial with "
        f"{score['count']} {facts} by {about['hparams']['alg_name']}, the best of {len(ranked)} "
        f"windows tried (of {len(location.windows)}); unedited {before['utility']['mean']:.1f}{kept}"
    )
    return Chosen("layers", list(best["layers"]), reason)


def _with_measured(found: Proposal, location: locating.Location) -> Proposal:
    """The proposal, which says what was measured."""
    notes = verdict(location) if tried(location.measured.rows["trial"]) else ()
    found = replace(found, notes=(*found.notes, *notes), measured=_measured(location))
    found.hparams()
    return found


def _deciding(location: locating.Location) -> list[str]:
    """Hashes of the records that chose the layers; none where no window was tried."""
    return [record_hash(record) for record in location.records] if tried(location.measured.rows["trial"]) else []


def _measured(location: locating.Location) -> str:
    if not tried(location.measured.rows["trial"]):
        return "no edit was tried on it"
    return "its layers by trials on it, so report no score on the facts that they used"
