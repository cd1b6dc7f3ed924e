"""Hyper-parameters of UnKE."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyedit_moe.facts.tokens import FACT_TOKENS
from easyedit_moe.hparams.base import MoEHyperParams


@dataclass(kw_only=True)
class UnKEHyperParams(MoEHyperParams):
    """UnKE (arXiv 2405.15349). Stage 1 has the solvers' names (v_...); stage 2 fits the layer."""

    fact_token: str = "subject_last"
    """Where the fact sits: subject_last, subject_first, last or subject_first_after_last. UnKE's paper: last."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts put before each prompt, in both stages; the bare prompt always counts too. Ours."""
    v_lr: float = 0.5
    """Stage 1: Adam's learning rate for hidden states, > 0. Papers: 0.5."""
    v_num_grad_steps: int = 25
    """Stage 1: Adam steps, >= 1. Papers: 25 / 50."""
    v_weight_decay: float = 1e-3
    """Stage 1: weight of ``||delta|| / ||h||^2``, >= 0. Papers: 1e-3."""
    clamp_norm_factor: float = 4.0
    """Stage 1: bound on ``||delta|| / ||h||``, > 0. EasyEdit's UnKE: 4."""
    kl_factor: float = 0.0
    """Stage 1: weight of the KL term on "{subject} is a", >= 0. UnKE has none."""
    early_stop_loss: float = 0.05
    """Stage 1: a request whose loss falls below stops, >= 0. Ours."""
    target_batch_size: int | None = None
    """Stage 1: token sequences per forward, >= 1; None: 256, or on a GPU as many as half of its free memory holds.
    Ours."""
    target_cache_dir: str | None = None
    """Stage 1: folder in which target vectors are kept per request; None: they are found anew each time. Ours."""
    lr: float = 2e-4
    """Stage 2: Adam's learning rate for the layer's parameters, > 0. Papers: 2e-4 / 1e-4."""
    optim_num_step: int = 50
    """Stage 2: Adam steps, >= 1. Papers: 50."""
    train: str = "experts"
    """What stage 2 trains: experts (all parameters of the routed experts), down_projections, or layer (all of the
    decoder layer, router and attention included, which is what UnKE does on dense models). Ours: experts."""
    preserve_dataset: str = "wikipedia"
    """Texts on which the layer is to stay as it is: a file, a folder, "factworld", a dataset name, or "generated": the
    model's own samples. UnKE: Alpaca."""
    preserve_n_samples: int = 20
    """Texts of it to use, >= 0. EasyEdit's UnKE: 20."""
    preserve_weight: float = 1.0
    """Weight of a token that is to stay as it is, against a fact token's, >= 0. UnKE: 1."""
    train_batch_size: int = 256
    """Stage 2: token sequences per forward; each step sees all of them, >= 1. Ours."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least(
            {
                "v_num_grad_steps": 1, "v_weight_decay": 0, "kl_factor": 0, "early_stop_loss": 0,
                "optim_num_step": 1, "preserve_n_samples": 0, "preserve_weight": 0,
                "train_batch_size": 1,
            }
        )  # fmt: skip
        fine = self.target_batch_size is None or self.target_batch_size >= 1
        self._require("target_batch_size", fine, "None or at least 1")
        for name in ("v_lr", "clamp_norm_factor", "lr"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require_one_of({"fact_token": FACT_TOKENS, "train": ("experts", "down_projections", "layer")})
        self._require("layers", len(self.layers) == 1, "a single layer for UnKE")
