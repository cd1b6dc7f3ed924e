"""Hyper-parameters of MEMoE."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyedit_moe.hparams.base import MoEHyperParams

WITHOUT_ANCHOR = ("skip", "null")


@dataclass(kw_only=True)
class MEMoEHyperParams(MoEHyperParams):
    """MEMoE (arXiv 2405.19086). Its equations are the paper's; all defaults are ours."""

    num_experts: int = 4
    """E, experts of the adapter, >= 1. Ours."""
    top_k: int = 1
    """Experts per token, 1..num_experts. Ours."""
    expert_width: int = 256
    """Hidden width of one expert, >= 1. Ours."""
    adapter_scale: float = 1.0
    """lambda, the weight of the adapter's output, > 0. Ours."""
    token_weight: float = 1.0
    """Weight of x_i beside the anchor in the gate's input, >= 0. Paper: 1; 0 routes by the anchor alone."""
    use_anchors: bool = True
    """Find the subjects of edited facts in texts. False: every token has the null embedding (needs "null"). Paper:
    true."""
    without_anchor: str = "skip"
    """Tokens without an anchor: "skip" leaves them to the FFN, bit-equal; "null" gives them a learned embedding.
    Ours."""
    steps: int = 100
    """Adam steps per batch of edits, >= 1. Ours."""
    lr: float = 1e-3
    """Adam's learning rate, falling linearly to a tenth, > 0. Ours."""
    noise: float = 0.1
    """Standard deviation of eps in the gate while training, >= 0. Ours."""
    locality_weight: float = 3.0
    """Weight of KL(frozen model, edited model) on texts that say nothing of the edits, >= 0. Ours."""
    balance_weight: float = 0.1
    """Weight of the load-balancing term, >= 0. Ours."""
    locality_dataset: str = "wikipedia"
    """Texts for the locality term: a file, a folder, "factworld", a dataset name, or "generated": the frozen
    model's own samples. Ours."""
    locality_n_samples: int = 1000
    """Texts of it to use, >= 1. Ours."""
    locality_max_tokens: int = 32
    """Tokens at which such a text is cut, >= 1. Ours."""
    locality_batch_size: int = 16
    """Such texts per step, >= 1. Ours."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts of which one is put before the prompt at a part of the steps, evenly with the bare prompt. Ours."""
    train_batch_size: int = 64
    """Edits per step, >= 1. Ours."""
    replay: bool = True
    """Train earlier sequential batches along with the new one. Ours."""
    replay_facts: int = 256
    """Earlier facts that are trained along with a batch, at most; drawn anew for each batch from all that are
    remembered, >= 1. Ours."""
    max_facts: int = 2000
    """Facts, and with them subjects and anchors, that an adapter keeps, at most: the oldest leave, and texts about
    their subjects alone are the unedited model's again, >= 1. Ours."""
    seed: int = 0
    """Seed of the adapter's initialisation, the noise and the order of texts. Ours."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require("layers", len(self.layers) == 1, "exactly one layer for MEMoE")
        self._require_at_least(
            {
                "num_experts": 1, "expert_width": 1, "steps": 1, "locality_n_samples": 1, "locality_max_tokens": 1,
                "locality_batch_size": 1, "train_batch_size": 1, "token_weight": 0, "noise": 0, "locality_weight": 0,
                "balance_weight": 0, "replay_facts": 1, "max_facts": 1,
            }
        )  # fmt: skip
        for name in ("lr", "adapter_scale"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require("top_k", 1 <= self.top_k <= self.num_experts, f"in 1..{self.num_experts}, the experts")
        self._require_one_of({"without_anchor": WITHOUT_ANCHOR})
        if not self.use_anchors:
            self._require("without_anchor", self.without_anchor == "null", "null where use_anchors is false")
