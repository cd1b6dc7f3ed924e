"""General ability by lm-evaluation-harness (the extra ``eval``), run on a loaded model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import DataError, DependencyError, did_you_mean
from easyedit_moe.moe.capture import inference_mode_of
from easyedit_moe.storage.files import is_folder, path_of

BOOTSTRAP = 1000  # resamples for standard errors that have no closed form
SEED = 1234  # the harness's own


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as the harness reports it.

    Attributes:
        value: in the metric's own unit: a share in [0, 1] for accuracies.
        stderr: its standard error; None where the harness gives none.
        count: examples that were asked.
    """

    value: float
    stderr: float | None
    count: int


class Harness:
    """Tasks that were found, to be run on one model again and again.

    Args:
        tasks: names of tasks, groups or tags.
        tasks_dir: a folder of tasks (YAML files) of one's own; where it has all of ``tasks``, those that the harness
            ships are not looked at, and nothing is fetched unless the tasks themselves ask for it.
        limit: examples per task; all by default.
        batch_size: sequences per forward.
        progress: show the harness's progress bars, on a terminal.
        chat: prompts go through the tokenizer's chat template, in the harness's own way.

    Raises:
        DependencyError: lm-evaluation-harness is not installed. DataError: no such folder or task, or data of a task
            that can't be loaded.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        tasks_dir: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        progress: bool = True,
        chat: bool = False,
    ) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"limit must be at least 1 example per task; found {limit}.")
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1; found {batch_size}.")
        self.tasks, self.limit, self.batch_size = list(tasks), limit, batch_size
        self.progress, self.chat = progress, chat
        self._manager = _manager(self.tasks, tasks_dir)
        self._ready: Any = self._load()

    def scores(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> dict[str, dict[str, TaskScore]]:
        """Each task's metrics, by the names that the harness gives them; model, tokenizer and generators are as before.

        Examples and their order are the same each time.
        """
        loaded, self._ready = self._ready or self._load(), None  # tasks keep answers, so each run has its own
        with inference_mode_of(model), _seeded(), self._quiet():
            in_chat = {"apply_chat_template": True} if self.chat else {}
            wrapped = _import("lm_eval.models.huggingface").HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=self.batch_size
            )
            results = _import("lm_eval.evaluator").evaluate(
                wrapped, loaded, limit=self.limit, bootstrap_iters=BOOTSTRAP, log_samples=False, **in_chat
            )
        counts = results["n-samples"]
        return {name: _metrics(found, _count(found, counts.get(name))) for name, found in results["results"].items()}

    def _load(self) -> Any:
        """The tasks with their data, set up as the harness's own command does."""
        try:
            with _seeded(), self._quiet():
                loaded = self._manager.load(self.tasks)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise DataError(
                f"The tasks {', '.join(self.tasks)} can't be loaded: {type(error).__name__}: {error}. Their data must "
                "be on this machine, or the hub reachable."
            ) from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No advice from the harness, and no bars unless they are wanted and seen."""
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)
        hidden = contextlib.nullcontext() if self.progress and sys.stderr.isatty() else _hidden_bars()
        try:
            with hidden:
                yield
        finally:
            logger.setLevel(level)


def version() -> str:
    """Version of the harness.

    Raises:
        DependencyError: it is not installed.
    """
    return str(getattr(_import("lm_eval"), "__version__", "unknown"))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"Tasks are run by lm-evaluation-harness, which can't be imported ({error}). Install it: "
            "pip install 'easyedit-moe[eval]'"
        ) from error


def _manager(tasks: Sequence[str], tasks_dir: str | Path | None) -> Any:
    manager_class = _import("lm_eval.tasks").TaskManager
    if tasks_dir is not None and not is_folder(path_of(tasks_dir, "tasks_dir", DataError)):
        raise DataError(f"The folder of tasks {tasks_dir} does not exist.")
    where = {} if tasks_dir is None else {"include_path": str(tasks_dir)}
    manager = manager_class(**where, include_defaults=False) if where else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = manager_class(**where)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        hint = did_you_mean(unknown[0], manager.all_tasks)
        there = f" {tasks_dir} has none of this name, and" if where else ""
        raise DataError(
            f"Unknown task {unknown[0]!r}.{hint}{there} lm-evaluation-harness {version()} does not ship it."
        )
    return manager


@contextlib.contextmanager
def _hidden_bars() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """All generators start from one seed inside, and go on afterwards as if nothing had happened."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _count(found: Mapping[str, Any], samples: Mapping[str, int] | None) -> int:
    return int((samples or {}).get("effective", found.get("sample_len", 0)) or 0)


def _metrics(found: Mapping[str, Any], count: int) -> dict[str, TaskScore]:
    """``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`` as scores by metric; the filter is named where it is one."""
    out = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        out[name] = TaskScore(float(value), float(error) if isinstance(error, (int, float)) else None, count)
    return out
