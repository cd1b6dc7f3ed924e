"""How long ``locate`` will take, from one timed forward and the number of tokens that each stage computes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.facts.records import EvaluationRecord
from easyedit_moe.facts.tokens import encode_context, pad_id
from easyedit_moe.hparams import SolverHyperParams
from easyedit_moe.localisation.prompts import phrasings
from easyedit_moe.localisation.routing import fact_experts
from easyedit_moe.localisation.windows import Window
from easyedit_moe.measure import synchronise
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.workflow.locate_settings import LocateSettings

BACKWARD = 3.0
"""What a step of the search costs, in forwards: a forward, and a backward of twice that."""
TIMED = 64
"""Token sequences of the forward that is timed."""
ANSWER = 3
"""Tokens that are reckoned for an answer and a word around it."""


@dataclass(frozen=True)
class Cost:
    """What one stage is expected to take.

    Attributes:
        stage: its name.
        units: layers, or windows, each of which is saved when it is done; the routing of all layers is one.
        seconds: of all units.
    """

    stage: str
    units: int
    seconds: float


@dataclass(frozen=True)
class Workload:
    """Tokens of the facts.

    Attributes:
        per_token: seconds of a forward per token, measured.
        active: experts per token.
        prompts: tokens of all prompts.
        suffixes: of all prompts, from the fact token on.
        phrasings: of all paraphrases.
        judged: of all prompts by which edits are scored, each once per answer.
        depth: number of decoder layers.
        model: whose shapes say what statistics need.
        fingerprint: of the model.
    """

    per_token: float
    active: int
    prompts: int
    suffixes: int
    phrasings: int
    judged: int
    depth: int
    model: nn.Module
    fingerprint: str

    @staticmethod
    def of(
        view: MoELayerView,
        tok: PreTrainedTokenizerBase,
        records: Sequence[EvaluationRecord],
        hparams: SolverHyperParams,
        protocol: str,
    ) -> Workload:
        """Count the tokens, and time a forward of all prompts; raises what these raise."""
        place, chat = hparams.fact_token, hparams.chat
        groups = [phrasings(tok, record, place, chat) for record in records]
        own, layers = [group[0] for group in groups], sorted(view.layers)
        many = (own * (TIMED // len(own) + 1))[:TIMED]  # a full batch, as most of what follows is
        fact_experts(view, own, layers, pad_id(tok), TIMED)  # the first forward also sets up what later ones reuse
        synchronise()
        start = time.perf_counter()
        picked = fact_experts(view, many, layers, pad_id(tok), TIMED)
        synchronise()
        seconds, tokens = time.perf_counter() - start, sum(len(prompt.ids) for prompt in own)
        answers = 2 if protocol == "counterfact" else 1
        return Workload(
            seconds / sum(len(prompt.ids) for prompt in many),
            int(torch.stack([found.sum(1).max() for found in picked.values()]).max()),
            tokens + ANSWER * len(own),
            sum(len(prompt.ids) - prompt.fact + ANSWER for prompt in own),
            sum(len(prompt.ids) + ANSWER for group in groups for prompt in group[1:]),
            answers * _judged(tok, records, chat),
            view.num_layers,
            view.model,
            model_fingerprint(view),
        )

    def routing(self) -> float:
        """Seconds of the routing of all layers."""
        return self.per_token * (self.prompts + self.phrasings + self.judged / 2)

    def tracing(self, settings: LocateSettings) -> float:
        """Seconds per layer; the runs that all layers share are left out."""
        return self.per_token * self.prompts * settings.tracing.samples

    def experts(self, settings: LocateSettings) -> float:
        """Seconds per layer."""
        return self.tracing(settings) * self.active

    def search(self, hparams: SolverHyperParams, layer: int) -> float:
        """Seconds of the search of target vectors at a layer, if no fact stops early."""
        rows = self.suffixes * (len(hparams.context_prefixes) + 1)
        above = (self.depth - layer) / self.depth
        return self.per_token * rows * above * BACKWARD * (hparams.v_num_grad_steps + 1)

    def reachability(self, hparams: SolverHyperParams, layer: int) -> float:
        """Seconds of a layer: the search, and every phrasing without and with the shift."""
        return self.search(hparams, layer) + self.per_token * 4 * self.phrasings

    def statistics(self, hparams: SolverHyperParams, layers: Window) -> float:
        """Seconds of the statistics of some layers if routing is even; 0 where each has a file in the cache."""
        folder = statistics_folder(hparams.stats_dir, hparams.model_name, self.fingerprint)
        if all(any(folder.glob(f"layer{layer}-*.safetensors")) for layer in layers):
            return 0.0
        found = plan_statistics(replace(hparams, layers=list(layers)), self.model)
        if found is None:
            return 0.0
        tokens = found.most_tokens if found.least_tokens is None else found.least_tokens
        return self.per_token * tokens * (layers[-1] + 1) / self.depth

    def trial(self, hparams: SolverHyperParams, window: Window, searched: bool) -> float:
        """Seconds of a window; without the search where its last layer's targets are there already."""
        captures = self.prompts * (len(hparams.context_prefixes) + 1) * (len(window) + 1)
        found = 0.0 if searched else self.search(hparams, window[-1])
        return found + self.per_token * (captures + 2 * self.judged)


def _judged(tok: PreTrainedTokenizerBase, records: Sequence[EvaluationRecord], chat: bool) -> int:
    texts = [
        text
        for record in records
        for text in (record.request.prompt, *record.paraphrases, *(prompt for prompt, _ in record.neighbours))
    ]
    return sum(len(encode_context(tok, text, chat)) + ANSWER for text in texts)


def costs(
    load: Workload,
    settings: LocateSettings,
    hparams: SolverHyperParams,
    todo: Mapping[str, Sequence[int | Window]],
) -> list[Cost]:
    """The expected cost of what is left to do, stage by stage; see `seconds_of` for one unit.

    Windows with the same last layer share a search.
    """
    found = []
    for stage, units in todo.items():
        seconds = sum(seconds_of(load, settings, hparams, stage, unit) for unit in units)
        if stage == "trial" and "reachability" not in settings.stages:
            last = [unit[-1] for unit in units if isinstance(unit, tuple)]
            seconds -= sum(load.search(hparams, layer) * (last.count(layer) - 1) for layer in set(last))
        if units:
            found.append(Cost(stage, len(units), seconds))
    return found


def seconds_of(
    load: Workload, settings: LocateSettings, hparams: SolverHyperParams, stage: str, unit: int | Window
) -> float:
    """What one unit of a stage is expected to take."""
    if stage == "routing":
        return load.routing()
    if stage == "tracing":
        return load.tracing(settings)
    if stage == "experts":
        return load.experts(settings)
    if isinstance(unit, int):
        return load.reachability(hparams, unit)
    if stage == "statistics":
        return load.statistics(hparams, unit)
    return load.trial(hparams, unit, "reachability" in settings.stages)
