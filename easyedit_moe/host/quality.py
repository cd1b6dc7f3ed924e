"""EasyEdit's own numbers for a model: its ``compute_edit_quality``, over all requests, before and after all edits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.host.datasets import easyedit_requests
from easyedit_moe.host.importing import check_symbols
from easyedit_moe.host.loading import load
from easyedit_moe.host.padding import name_for_host, padded
from easyedit_moe.moe.capture import inference_mode_of, model_device


class EasyEditQuality:
    """Scores one model again and again by EasyEdit's protocol; made on the unedited one, for locality.

    ``rewrite_acc`` and ``rephrase_acc`` are the share of the new target's tokens that are the model's own first choice,
    given the tokens before; ``locality_acc`` compares with the unedited model; ``portability_acc`` as the first two.

    Raises:
        HostError: EasyEdit is not there.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EvaluationRecord]) -> None:
        load()
        self._host = check_symbols()
        self.model, self.tok, self.model_name = model, tok, name_for_host(model)
        self.requests = easyedit_requests(records)
        self._before = self._quality("pre-edit")

    def measure(self, label: str) -> dict[str, Score]:
        """Scores of the model as it is now; ``label`` names the row's method to EasyEdit."""
        after = self._quality(label)
        found: dict[str, list[float | None]] = {
            "rewrite_acc": [],
            "rephrase_acc": [],
            "locality_acc": [],
            "portability_acc": [],
        }
        hparams = self._hparams(label)
        for request, pre, post in zip(self.requests, self._before, after, strict=True):
            self._host["finalize_locality_metrics"]({"pre": pre, "post": post}, request, hparams, self.model_name)
            for name in ("rewrite_acc", "rephrase_acc"):
                found[name].append(float(np.mean(post[name])) if name in post else None)
            for section in ("locality", "portability"):
                values = [np.mean(v) for key, v in post[section].items() if key.endswith("_acc") and np.size(v)]
                found[f"{section}_acc"].append(float(np.mean(values)) if values else None)
        return {name: Score.of(values) for name, values in found.items()}

    def _quality(self, label: str) -> list[dict[str, Any]]:
        hparams, device = self._hparams(label), model_device(self.model)
        compute = self._host["compute_edit_quality"]
        with inference_mode_of(self.model), padded(self.tok), contextlib.redirect_stdout(io.StringIO()):
            return [
                compute(self.model, self.model_name, hparams, self.tok, request, device) for request in self.requests
            ]

    def _hparams(self, label: str) -> Any:
        return SimpleNamespace(alg_name=label, max_length=512, device=str(model_device(self.model)))
