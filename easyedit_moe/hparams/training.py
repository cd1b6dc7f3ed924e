"""Hyper-parameters of fine-tuning and low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyedit_moe.facts.tokens import FACT_TOKENS
from easyedit_moe.hparams.base import MoEHyperParams

ORDERS = ("minibatch", "depth_first")


@dataclass(kw_only=True)
class TrainingHyperParams(MoEHyperParams):
    """What the methods share that minimise the NLL of the new answers by gradient descent."""

    lr: float = 1e-3
    """Adam's learning rate, > 0. Papers: FT and FT-L 1e-3; AdaLoRA 5e-3 / 5e-4."""
    num_steps: int = 25
    """Passes over the facts of a batch (of one fact, for depth_first), >= 1. Papers: 25."""
    num_updates: int = 0
    """Updates after which the training of a batch ends, >= 0; 0: as many as ``num_steps`` passes make. Papers: AdaLoRA
    25, others 0."""
    weight_decay: float = 0.0
    """Adam's weight decay, >= 0. EasyEdit: 0."""
    order: str = "minibatch"
    """minibatch: all facts in random batches, again and again. depth_first: one fact after the other, as of old.
    Ours: minibatch."""
    train_batch_size: int = 8
    """Facts per step, >= 1; 1 for depth_first. Ours."""
    early_stop_loss: float = 0.01
    """Training stops where the mean loss falls below, >= 0. As in ROME's FT."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts put before each prompt, to train on as well; the bare prompt always counts too. Ours."""
    seed: int = 42
    """Seed of the order of facts, and of what is drawn at random. Ours."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least(
            {"num_steps": 1, "num_updates": 0, "weight_decay": 0, "train_batch_size": 1, "early_stop_loss": 0}
        )
        self._require("lr", self.lr > 0, "greater than 0")
        self._require_one_of({"order": ORDERS})


@dataclass(kw_only=True)
class FTHyperParams(TrainingHyperParams):
    """Fine-tuning of the experts' down-projections."""

    norm_constraint: float | None = 1e-3
    """Bound on the change of each weight, > 0; None for MoE-FT. Papers: 1e-3 for FT-L."""
    experts: str = "all"
    """all: each expert that an example reaches; routed: those that the router picks for the fact tokens. Ours."""
    fact_token: str = "subject_last"
    """The token whose experts are meant by routed. As in ROME."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_one_of({"experts": ("all", "routed"), "fact_token": FACT_TOKENS})
        if self.alg_name == "MoE-FT-L":
            bound = self.norm_constraint
            self._require("norm_constraint", bound is not None and bound > 0, "greater than 0 for MoE-FT-L")


@dataclass(kw_only=True)
class LoRAHyperParams(TrainingHyperParams):
    """Low-rank adapters by peft, merged after training."""

    lr: float = 5e-3
    rank: int = 8
    """Rank per expert or module, >= 1; for AdaLoRA the mean rank in the end. Papers: 8."""
    lora_alpha: float = 32.0
    """Adapters are scaled by alpha / rank, > 0. Papers: 32."""
    train: str = "down_projections"
    """What MoE-LoRA adapts: down_projections, or experts for the gate and up projections as well. Ours."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the modules that AdaLoRA adapts, like q_proj; empty: every linear layer beside the MoE block,
    or all of a dense layer. Ours."""
    orth_reg_weight: float = 0.5
    """Weight of AdaLoRA's orthogonality term, >= 0. AdaLoRA (arXiv 2303.10512), peft: 0.5."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least({"rank": 1, "orth_reg_weight": 0})
        self._require("lora_alpha", self.lora_alpha > 0, "greater than 0")
        self._require_one_of({"train": ("down_projections", "experts")})
