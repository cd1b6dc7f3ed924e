"""``init``: hyper-parameters for a model that has none, chosen from its config, each with its reason."""

from __future__ import annotations

from pathlib import Path

from easyedit_moe.editors.proposal import Proposal
from easyedit_moe.editors.proposing import propose
from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import FactSet, load_facts
from easyedit_moe.storage.files import replacing
from easyedit_moe.workflow.settings import DEFAULT_METHOD


def init(
    model: str,
    method: str = "",
    data: str | Path | FactSet | None = None,
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
) -> Proposal:
    """Choose hyper-parameters and write them as a commented YAML; no weight is read.

    Args:
        model: hub name, folder or "factworld".
        method: of ours; by default Global.
        data: facts that will be edited: a file (see `load_facts`), or facts that were read.
        out: the YAML file; None writes none.
        trust_remote_code: let code that comes with the checkpoint run.
        force: write over a file that is there.

    Raises:
        DataError: no config by this name, unusable facts, or a file that is there or can't be written. MethodError: an
            unknown method, or EasyEdit's own. LayoutError, DenseModelError: no experts that can be edited.
    """
    path = None if out is None else Path(out)
    if path is not None and path.exists() and not (force and path.is_file()):
        raise DataError(
            f"{path} exists already; choose another name" + ("." if path.is_dir() else ", or pass --force.")
        )
    facts = load_facts(data) if isinstance(data, (str, Path)) else data
    found = propose(model, method or DEFAULT_METHOD, facts, trust_remote_code)
    found.hparams()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(found.yaml(), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} can't be written: {error}") from error
    return found
