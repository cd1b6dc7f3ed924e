"""``statistics``: gathers what edits need of the unedited model, so that an edit starts at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_moe.editors import make_editor
from easyedit_moe.editors.prepared import Prepared
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.hparams import MoEHyperParams, SolverHyperParams
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.workflow.session import Loaded, Loading, load
from easyedit_moe.workflow.settings import settings_for


@dataclass(frozen=True)
class LayerCoverage:
    """How well a layer's experts are covered.

    Attributes:
        layer: its index.
        least, median: tokens of the corpus per expert.
        unseen: experts that no token reached.
        null_space: the least and the largest dimension of an expert's null space; None for another metric.
    """

    layer: int
    least: int
    median: float
    unseen: int
    null_space: tuple[int, int] | None


@dataclass(frozen=True)
class Gathered:
    """What is in the cache now.

    Attributes:
        method: whose needs were met.
        layers: that edits of it solve for.
        folder: of the cache.
        files: of the model's statistics, with their bytes.
        reused: whether everything was there before.
        seconds: that gathering took, loading left out.
    """

    method: str
    layers: tuple[LayerCoverage, ...]
    folder: Path
    files: dict[str, int]
    reused: bool
    seconds: float


def statistics(
    model: str | Loaded = "factworld",
    method: str = "",
    hparams: str | Path | MoEHyperParams | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Gathered:
    """Gather second moments of keys (and MoTE's bases) and keep them; what is there already is read.

    Args:
        model: hub name, folder or "factworld", or a loaded model and its tokenizer.
        method: name; by default that of a file of hparams, else Global.
        hparams: a YAML file, a folder of <METHOD>/<model>.yaml, or values; by default those that ship for the model.
        overrides: hyper-parameters by name, such as ``{"stats_dir": "/data/stats"}``.
        progress: show progress bars.

    Raises:
        HyperParamsError: the method, as it is set, needs no statistics; further see `choose_hparams`. DataError: the
            model or the corpus can't be read. CacheError: a file in the cache is damaged.
    """
    settings = settings_for(model, method, hparams, overrides or {})
    if not isinstance(settings, SolverHyperParams) or not settings.needs_statistics:
        raise HyperParamsError(
            f"{settings.alg_name}, as it is set, needs no statistics, so there is nothing to gather."
        )
    editor = make_editor(settings, progress)
    net, tok = load(model, Loading.of(settings), progress)
    start = time.perf_counter()
    known = _files(Path(settings.stats_dir))
    prepared: Prepared = editor.prepare(net, tok)
    folder = statistics_folder(settings.stats_dir, settings.model_name, prepared.fingerprint)
    files = {path.name: size for path, size in _files(Path(settings.stats_dir)).items() if path.parent == folder}
    return Gathered(
        editor.method,
        tuple(_coverage(layer, found) for layer, found in prepared.layers.items()),
        folder,
        files,
        all(folder / name in known for name in files),
        time.perf_counter() - start,
    )


def _coverage(layer: int, prepared: Any) -> LayerCoverage:
    counts, ranks = prepared.coverage, prepared.null_space
    return LayerCoverage(
        layer,
        int(counts.min()),
        float(counts.double().quantile(0.5)),
        int((counts == 0).sum()),
        None if ranks is None else (min(ranks), max(ranks)),
    )


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
