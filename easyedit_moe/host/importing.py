"""Finding and importing EasyEdit, which is a folder on the path and not a package to install."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyedit_moe.errors import HostError
from easyedit_moe.host.placeholders import OPTIONAL, placeholders

logger = logging.getLogger(__name__)

HOST = "easyeditor"
HOME = "EASYEDIT_HOME"
TESTED = "14cea82 of 2026-07-14"
GET_IT = (
    "Get it with: git clone https://github.com/zjunlp/EasyEdit, then set EASYEDIT_HOME to that folder (or put it on "
    "PYTHONPATH)."
)

SYMBOLS = {
    "easyeditor.util.alg_dict": ("ALG_DICT",),
    "easyeditor.editors.editor": ("BaseEditor", "LOG", "finalize_locality_metrics", "make_logs"),
    "easyeditor.editors.batch_editor": ("BatchEditor.is_batchable_method",),
    "easyeditor.editors.utils": ("CALLABLE_RESTORE_ALGS",),
    "easyeditor.evaluate": ("compute_edit_quality",),
}
"""What we use of EasyEdit, by module; `check_symbols` names the first that is missing."""


def home() -> Path | None:
    """The folder named by ``EASYEDIT_HOME``, or None where it is not set.

    Raises:
        HostError: it is set, but names no folder, or one without an ``easyeditor`` folder.
    """
    named = os.environ.get(HOME)
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise HostError(f"{HOME} is {named!r}, and there is no such folder. {GET_IT}")
    if not (folder / HOST / "__init__.py").is_file():
        inside = folder.name == HOST and (folder / "__init__.py").is_file()
        hint = f" Name the folder that it lies in, {str(folder.absolute().parent)!r}." if inside else ""
        raise HostError(f"{HOME} is {named!r}, which holds no folder '{HOST}'.{hint} {GET_IT}")
    return folder


def is_available() -> bool:
    """Whether `load` would find EasyEdit; nothing is imported."""
    return HOST in sys.modules or home() is not None or importlib.util.find_spec(HOST) is not None


def import_with_placeholders(run: Any) -> None:
    """Call ``run``, which imports EasyEdit, with placeholders for what is absent; see `load`."""
    before = set(sys.modules)
    try:
        with placeholders(HOST) as used:
            run()
    except BaseException as error:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == HOST:
                del sys.modules[name]
        if isinstance(error, HostError) or not isinstance(error, ImportError):
            raise
        raise HostError(
            f"EasyEdit can't be imported: {error}. Install what it asks for; tested with its commit {TESTED}."
        ) from error
    if used:
        logger.warning(
            "EasyEdit was imported without %s, which text editing does not use.",
            ", ".join(sorted(OPTIONAL[name] for name in used)),
        )


def check_symbols() -> dict[str, Any]:
    """Everything of `SYMBOLS` by its last name, from the imported EasyEdit.

    Raises:
        HostError: EasyEdit is not imported, or lacks one of them.
    """
    if HOST not in sys.modules:
        raise HostError("EasyEdit is not imported yet. Import it, or call easyedit_moe.host.load().")
    where = getattr(sys.modules[HOST], "__file__", None) or HOST
    found: dict[str, Any] = {}
    for module, names in SYMBOLS.items():
        for name in names:
            try:
                value: Any = importlib.import_module(module)
                for part in name.split("."):
                    value = getattr(value, part)
            except (ImportError, AttributeError) as error:
                raise HostError(
                    f"{module}.{name} is missing in the EasyEdit at {where}: it is too old or too new for this "
                    f"package, which was tested with its commit {TESTED}. Check out that commit."
                ) from error
            found[name.rpartition(".")[2]] = value
    return found


@contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    entries = [] if folder is None else [str(folder)]
    sys.path[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            sys.path.remove(entry)


@contextmanager
def _process_state() -> Iterator[None]:
    """Random states, the root logger and the environment as before.

    Importing EasyEdit seeds the first, configures the second, and sets CUDA_LAUNCH_BLOCKING in the third; packages that
    it imports set more.
    """
    import numpy
    import torch

    root = logging.getLogger()
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), root.level, list(root.handlers)
    environment = dict(os.environ)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        root.setLevel(states[3])
        root.handlers[:] = states[4]
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update({k: v for k, v in environment.items() if os.environ.get(k) != v})
