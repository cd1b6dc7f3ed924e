"""MoE-FT: plain fine-tuning of the experts' down-projections on the new answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.trainable import check_writable, expert_parameters, trainable
from easyedit_moe.editors.training import Masters, Step, TrainingEditor, TrainingJob
from easyedit_moe.editors.training_planner import Trained
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_prompt, pad_id
from easyedit_moe.hparams import FTHyperParams
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.experts import ExpertLayout, ModuleListExperts
from easyedit_moe.moe.layers import MoELayerView


class MoEFTEditor(TrainingEditor):
    """Adam on the down-projections of the critical layers' experts, NLL of the new answers' tokens only.

    Where it differs from FT as editing papers run it (ROME's and EasyEdit's code): it trains the experts instead of one
    dense down-projection, in batches instead of fact by fact, as that order (kept as ``order: depth_first``) makes each
    fact overwrite those before it, with a float32 master copy of what is trained and Adam's state in float32.

    ``experts: all`` trains each expert that the router sends some token of the examples to, ``routed`` only those that
    it picks for a fact token, as long as the model is unedited; the rest then keeps its bits.
    """

    method = "MoE-FT"
    hparams: FTHyperParams

    def needs_subject(self) -> bool:
        """Only to find a fact token at the subject, whose experts are the ones to train."""
        return self.hparams.experts == "routed" and self.hparams.fact_token != "last"

    @classmethod
    def trained(cls, hparams: FTHyperParams, view: MoELayerView) -> Trained:
        """All down-projections of the layers; ``experts: routed`` trains fewer, which depends on the facts."""
        layers = view.require(hparams.layers)
        whole = Trained.of(p for moe in layers for p in expert_parameters(moe, "down_projections").values())
        return whole if hparams.norm_constraint is None else replace(whole, start=whole.numbers)

    def train(
        self, view: MoELayerView, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], job: TrainingJob
    ) -> Mapping[str, Tensor]:
        """Train the chosen experts; see the class."""
        parameters, slices = self._chosen(view, tok, facts)
        check_writable(parameters)
        for name in parameters:
            job.writer.keep(name)
        with trainable(view.model, parameters.values()):
            masters = Masters(parameters, slices)
            bound = self._bound(masters)
            job.fit(masters, bound)
            return masters.whole()

    def _bound(self, masters: Masters) -> Callable[[Step], None]:
        """Called after each step; keeps the values within the constraint, if there is one."""
        limit = self.hparams.norm_constraint
        if limit is None:
            return lambda step: None
        start = {name: value.clone() for name, value in masters.values.items()}

        def clamp(step: Step) -> None:
            with torch.no_grad():
                for name, value in masters.values.items():
                    value.clamp_(start[name] - limit, start[name] + limit)
            masters.push()

        return clamp

    def _chosen(
        self, view: MoELayerView, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest]
    ) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """The parameters to train and, where not all of a packed one, the experts."""
        layers, hp = view.require(self.hparams.layers), self.hparams
        every = {n: p for moe in layers for n, p in expert_parameters(moe, "down_projections").items()}
        if hp.experts == "all":
            return every, {}
        prompts = [
            encode_prompt(tok, fact.prompt, fact.subject, hp.fact_token, fact.target_new, hp.chat) for fact in facts
        ]
        found = capture_facts(view, [p.ids for p in prompts], [p.fact for p in prompts], hp.layers, [], pad_id(tok))
        parameters, slices = {}, {}
        for moe in layers:
            keys = found.keys[moe.index]
            picked = torch.unique(keys.expert[keys.gate != 0])
            for expert in picked.tolist():
                name, parameter = moe.experts.parameters_of(expert)
                parameters[f"{moe.experts_name}.{name}"] = parameter
                if not isinstance(moe.experts, ModuleListExperts):
                    slices[f"{moe.experts_name}.{name}"] = _rows_of(moe.experts.layout, parameter, picked)
        return parameters, slices


def _rows_of(layout: ExpertLayout, parameter: nn.Parameter, picked: Tensor) -> Tensor:
    """Where the picked experts lie along a packed parameter's first dimension: h rows each if below one another."""
    if parameter.dim() == 3:
        return picked
    rows = torch.arange(layout.d_hidden, device=picked.device)
    return (picked[:, None] * layout.d_hidden + rows).flatten()


apply_moe_ft_to_model = MoEFTEditor.apply_to_model
