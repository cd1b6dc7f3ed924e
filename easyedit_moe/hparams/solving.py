"""Hyper-parameters of the methods that solve for the experts' down-projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite

from easyedit_moe.algebra.nullspace import LOW_COVERAGE
from easyedit_moe.algebra.ranks import resolve_rank
from easyedit_moe.algebra.tucker import WHITENING
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.facts.tokens import FACT_TOKENS
from easyedit_moe.hparams.base import MoEHyperParams
from easyedit_moe.hparams.sites import EXPERTS, SITES

METRICS = ("identity", "nullspace", "covariance")

SPREADS = ("residual", "update", "once", "last")
VARIANTS = ("paper", "code")
_RANKS = {"rank_expert": 1.0, "rank_out": 1.0, "rank_in": 0.5}
"""Ranks that stand for those that are not given."""


@dataclass(kw_only=True)
class SolverHyperParams(MoEHyperParams):
    """What all solvers for expert weights share. Paper values: MoTE (arXiv 2605.16686), MoEEdit (arXiv 2602.10965)."""

    site: str = EXPERTS
    """What is edited in each of the ``layers``: experts (the routed ones), shared_expert, or dense (a plain FFN, as in
    the first layers of DeepSeek models); a shared expert or FFN counts as one expert. Papers: experts."""
    fact_token: str = "subject_last"
    """Where the fact sits: subject_last, subject_first, last or subject_first_after_last. As in ROME and MEMIT."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts put before each prompt, for targets and keys alike; the bare prompt always counts too. Ours."""
    v_lr: float = 0.1
    """Adam's learning rate for target vectors, > 0. Papers: Qwen 0.1, GPT-OSS 0.2."""
    v_num_grad_steps: int = 25
    """Adam steps, >= 1. Papers: Qwen 25, GPT-OSS 50."""
    v_loss_layer: int | None = None
    """Layer whose output is read as logits; only the last one is supported, so None or its index. EasyEdit: the
    last."""
    v_weight_decay: float = 0.5
    """Weight of ``||delta|| / ||h||^2``, >= 0. MoEEdit: 0.5."""
    clamp_norm_factor: float = 0.75
    """Bound on ``||delta|| / ||h||``, > 0. MoEEdit: 0.75."""
    kl_factor: float = 0.0625
    """Weight of the KL term on "{subject} is a", >= 0. Papers: 0.0625."""
    early_stop_loss: float = 0.05
    """A request whose target loss falls below stops, >= 0. As in MEMIT and AlphaEdit."""
    target_batch_size: int | None = None
    """Token sequences per forward while optimising targets, >= 1; None: 256, or on a GPU as many as half of its free
    memory holds. Halved where memory runs out. Ours."""
    target_cache_dir: str | None = None
    """Folder in which target vectors are kept per request; None: they are found anew each time. Ours."""
    capture_batch_size: int = 64
    """Token sequences per forward while capturing keys, >= 1. Ours."""
    mom2_dataset: str = "wikipedia"
    """Statistics corpus: a file of texts (text, JSON, JSONL, parquet), a folder of such, "factworld", a dataset name
    (streamed), or "generated": the model's own samples at temperature 1, without any download. Papers: Wikipedia."""
    mom2_n_samples: int = 100000
    """Texts of the corpus to use at most, >= 1. Papers: 100 000."""
    mom2_n_tokens: int | None = None
    """Tokens of the corpus to use at most, each text cut at ``max_length``, >= 1; None: no bound but the texts'. Not
    for "generated". Ours."""
    protected_dataset: str | None = None
    """Texts that count for more in the statistics than their tokens, as names or prompts that are to keep what they
    yield: a file, folder or dataset as for ``mom2_dataset``; None: none. At most ``mom2_n_samples`` are read. Ours."""
    protected_share: float = 0.5
    """The part of the statistics' weight that the texts of ``protected_dataset`` have, in (0, 1). Ours."""
    generated_length: int = 128
    """Tokens of a text that "generated" samples, >= 2; ``max_length`` bounds it, too. Ours."""
    generated_openings: list[str] = field(default_factory=list)
    """What samples begin with, by turns; empty: the tokenizer's beginning of text, or single common words. Ours."""
    generated_seed: int = 0
    """Seed of the samples. Ours."""
    coverage_target: float | None = 8.0
    """Statistics of a layer stop once each of its experts has this many times d_hidden tokens; None: after
    ``mom2_n_samples`` texts whatever the coverage, as in the papers. Ours."""
    mom2_dtype: str = "float32"
    """Dtype of the sums: float32 or float64. EasyEdit: float32."""
    stats_dir: str = "./data/stats"
    """Folder of cached statistics. EasyEdit: ./data/stats."""
    metric: str = "nullspace"
    """Metric M of the objective: identity (no null space), nullspace or covariance. Papers: nullspace."""
    nullspace_threshold: float | None = None
    """Eigenvalues up to this span the null space, >= 0; 0.02 where neither energy nor rank is given. Papers: 0.02,
    absolute."""
    nullspace_relative: bool = False
    """Read the threshold as a share of each expert's largest eigenvalue. Ours."""
    nullspace_energy: float | None = None
    """Instead of a threshold: the leading directions that hold this share of each expert's second moment (its trace)
    are protected, in (0, 1]. Ours."""
    nullspace_rank: int | float | None = None
    """Instead of a threshold: dimension of each expert's null space, an int, or a fraction of h. Ours."""
    covariance_ridge: float = 1e-3
    """Share of the mean variance added to each covariance's diagonal, >= 0. Ours."""
    low_coverage: str = "keep"
    """What becomes of experts with fewer than ``min_coverage`` tokens: keep, identity, pooled or frozen. Ours."""
    min_coverage: int = 1
    """Tokens an expert needs for its own statistics to count, >= 0. Ours."""
    lambda_reg: float | None = None
    """Ridge lambda, >= 0; 1 where lambda_relative is not given. MoTE: 0.1 / 1 / 0.01 for Qwen3-30B / GPT-OSS / Qwen3.6;
    MoEEdit: 1."""
    lambda_relative: float | None = None
    """Instead of lambda_reg: lambda in units of the mean squared norm of the facts' routed, gated and projected keys at
    each layer, >= 0, so that it carries over from model to model. Ours."""
    spread: str = "residual"
    """residual: re-collect keys per layer, residual over layers left. update: solve at the last layer, share the
    solution out. once: collect all layers' keys in one forward, each solves for its share. last: the last layer alone.
    Papers: residual; MoTE's paper, eq. 14: update; once and last are ours."""
    rounds: int = 1
    """With spread once: how often keys are collected and solved for, >= 1, each time for an equal part of what is left.
    Ours."""
    shares: list[float] = field(default_factory=list)
    """With spread once: each layer's share of the residual, >= 0; empty: 1 / (layers left). Ours."""
    remember_edits: bool = False
    """Keep what the keys of earlier sequential batches yield, as rows with zero residual; a prompt that is edited again
    counts once. The cost of a batch is bounded (`easyedit_moe.algebra.held`). As in AlphaEdit; off by default,
    which is ours."""
    join_facts: bool = False
    """Facts that lie at one token, as several relations of a person whose prompts begin with the name, get one target
    vector that serves them all; those of earlier batches, too, whose keys are released as if they were edited again.
    ``final_nll`` and ``reached`` are then of all of them together. Ours."""
    replay_facts: int = 0
    """Facts of earlier sequential batches, drawn at random, that are edited again with each batch, >= 0, as later edits
    move their keys and undo a part of them; what a batch costs stays bounded. A fact that still holds costs one forward
    and only has its key collected anew. With ``join_facts`` one fact stands for all at its token. Ours."""
    anchor_targets: bool = False
    """Weight decay and clamp of a target vector are of the way from the state before the first edit at its token, so
    that edits of the same facts do not walk further and further. Ours, after arXiv 2602.02543."""
    norm_anchor: float | None = None
    """Bound on each expert's ``||W_j||_F`` in units of its norm before the first edit, >= 1: updates are shortened to
    keep it (`easyedit_moe.algebra.norm_anchor`). Ours, after arXiv 2602.02543."""
    cumulative_ridge: bool = False
    """The penalty is on what all edits together changed, not on each batch's part of it: every batch is the minimiser
    for all current facts at once (``remember_edits``), so that weights grow with the number of facts and not of edits.
    It takes a copy of the edited weights in float32. Ours, after LyapLock, arXiv 2505.15702."""
    preservation_bound: float | None = None
    """Bound on the mean preservation loss over all batches, a share > 0 of the preserved outputs' energy: while it is
    exceeded a queue makes lambda grow (`easyedit_moe.algebra.preservation`). Ours, after LyapLock, arXiv 2505.15702."""
    sequence_rate: float | None = None
    """Residuals are normalised by running statistics of all edits and scaled by this times the energy of normalised
    keys, > 0 (`easyedit_moe.algebra.sequence_norm`). Ours, after UltraEdit, arXiv 2505.14679."""
    sphere_energy: float | None = None
    """Updates leave out the leading directions that hold this share of each expert's squared weights, in (0, 1]
    (`easyedit_moe.algebra.hypersphere`). Paper (SPHERE, arXiv 2510.01172): its cumulative ratio."""
    sphere_strength: float = 1.0
    """How much of these directions is left out, in (0, 1]. Paper (SPHERE): its alpha."""
    refresh_every: int | None = None
    """Edits after which the statistics are read again on the edited model, and the metric is made anew, >= 1; None:
    never. Ours."""
    keep_originals: bool = True
    """Whether a `MoEEditor` keeps what sequential edits overwrote, once, in main memory; without, they are undone with
    the unedited model as ``base``. Ours."""

    @property
    def needs_statistics(self) -> bool:
        """Whether second moments of keys are needed: by the metric, or to whiten a Tucker basis."""
        return self.metric != "identity"

    @property
    def carries(self) -> bool:
        """Whether a batch depends on what the batches before it carried on."""
        options = (
            self.replay_facts or None,
            self.cumulative_ridge or None,
            self.norm_anchor,
            self.preservation_bound,
            self.sequence_rate,
            self.refresh_every,
        )
        return self.remember_edits or self.join_facts or self.anchor_targets or any(one is not None for one in options)

    @property
    def edited_layers(self) -> list[int]:
        """The critical layers that are solved for and written."""
        return self.layers[-1:] if self.spread == "last" else self.layers

    @property
    def layer_shares(self) -> list[float]:
        """``shares``, or what stands for them where there are none: 1 / (layers left)."""
        return self.shares or [1 / left for left in range(len(self.layers), 0, -1)]

    def __post_init__(self) -> None:
        self._take_one("lambda_reg", 1.0, "lambda_relative")
        self._take_one("nullspace_threshold", 0.02, "nullspace_energy", "nullspace_rank")
        super().__post_init__()

    def _take_one(self, name: str, default: float, *others: str) -> None:
        """Of settings for the same thing one may be given; ``name`` has its default where none is."""
        given = [one for one in (name, *others) if getattr(self, one) is not None]
        if len(given) > 1:
            raise HyperParamsError(
                f"{' and '.join(given)} say the same thing in different ways; found "
                f"{', '.join(f'{one}: {getattr(self, one)!r}' for one in given)}. Keep one, and set the others to null."
            )
        if not given:
            setattr(self, name, default)

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least(
            {
                "v_num_grad_steps": 1, "capture_batch_size": 1, "mom2_n_samples": 1,
                "min_coverage": 0, "v_weight_decay": 0, "kl_factor": 0, "early_stop_loss": 0, "covariance_ridge": 0,
                "generated_length": 2, "rounds": 1, "replay_facts": 0,
                **{name: 0 for name in ("nullspace_threshold", "lambda_reg", "lambda_relative") if self._has(name)},
            }
        )  # fmt: skip
        for name in ("v_lr", "clamp_norm_factor"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        fine = self.coverage_target is None or self.coverage_target > 0
        self._require("coverage_target", fine, "None or greater than 0")
        for name in ("target_batch_size", "mom2_n_tokens"):
            self._require(name, not self._has(name) or getattr(self, name) >= 1, "None or at least 1")
        self._require_one_of(
            {
                "site": SITES, "fact_token": FACT_TOKENS, "metric": METRICS, "spread": SPREADS,
                "low_coverage": LOW_COVERAGE, "mom2_dtype": ("float32", "float64"),
            }
        )  # fmt: skip
        self._check_protected()
        self._check_null_space()
        self._check_shares()
        self._check_lasting()

    def _check_protected(self) -> None:
        source, read = self.protected_dataset, self.needs_statistics
        self._require("protected_dataset", source not in ("", "generated"), "None, or texts (mom2_dataset: generated)")
        self._require("protected_dataset", read or source is None, "None where no statistics are read")
        self._require("protected_share", 0 < self.protected_share < 1, "in (0, 1)")

    def _check_lasting(self) -> None:
        anchor, refresh = self.norm_anchor, self.refresh_every
        self._require("norm_anchor", anchor is None or 1 <= anchor < inf, "None or at least 1")
        self._require("refresh_every", refresh is None or refresh >= 1, "None or at least 1")
        for name in ("preservation_bound", "sequence_rate"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < inf, "None or greater than 0")
        energy = self.sphere_energy
        self._require("sphere_energy", energy is None or 0 < energy <= 1, "None or in (0, 1]")
        self._require("sphere_strength", 0 < self.sphere_strength <= 1, "in (0, 1]")
        fine = not self.cumulative_ridge or (self.remember_edits and self.spread != "update")
        self._require("cumulative_ridge", fine, "false without remember_edits, and with spread update")
        for name in ("preservation_bound", "refresh_every"):
            unset = getattr(self, name) is None or self.metric != "identity"
            self._require(name, unset, "None where metric is identity, which has no statistics")

    @property
    def keeps_drift(self) -> bool:
        """Whether an option keeps, of each layer, what all edits together changed."""
        return self.cumulative_ridge or self.preservation_bound is not None

    @property
    def changes_updates(self) -> bool:
        """Whether an option keeps or changes the update of a layer before it is written."""
        return self.keeps_drift or self.sphere_energy is not None or self.norm_anchor is not None

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check_null_space(self) -> None:
        threshold, energy = self.nullspace_threshold, self.nullspace_energy
        if self.nullspace_relative:
            fine = threshold is not None and threshold <= 1
            expected = "at most 1 where it is relative, and not null (energy and rank are relative as they are)"
            self._require("nullspace_threshold", fine, expected)
        self._require("nullspace_energy", energy is None or 0 < energy <= 1, "in (0, 1]")
        if self.nullspace_rank is not None:
            self._require_rank("nullspace_rank")

    def _check_shares(self) -> None:
        known = [share for share in self.shares if share >= 0 and isfinite(share)]
        fine = not self.shares or (len(known) == len(self.shares) == len(self.layers) and sum(known) > 0)
        self._require("shares", fine, f"one number >= 0 for each of the {len(self.layers)} layers, not all 0")
        for name, given in (("rounds", self.rounds != 1), ("shares", bool(self.shares))):
            self._require(name, self.spread == "once" or not given, f"left out unless spread is once ({self.spread})")

    def _require_rank(self, name: str) -> None:
        rank = getattr(self, name)
        fine = 0 < rank <= 1 if isinstance(rank, float) else rank >= 1
        self._require(name, fine, "a whole number from 1, or a fraction in (0, 1]")


@dataclass(kw_only=True)
class MoTEHyperParams(SolverHyperParams):
    """MoTE: ridge on a Tucker core. The paper does not state its ranks; ours are explicit."""

    rank_expert: int | float | None = None
    """Rank of the expert mode: an int, or a fraction of E; 1.0 without tucker_energy, and 1 at another
    ``site`` than the routed experts. Ours."""
    rank_out: int | float | None = None
    """Rank of the output mode: an int, or a fraction of d; 1.0 without tucker_energy. Ours."""
    rank_in: int | float | None = None
    """Rank of the input mode: an int, or a fraction of h; 0.5 without tucker_energy. Ours."""
    tucker_energy: list[float] = field(default_factory=list)
    """Instead of the ranks: the shares in (0, 1] of the (whitened) weights' squared norm that the factors of the
    expert, output and input mode keep, in this order, so that each layer has its own ranks. Ours."""
    whitening: str = "in"
    """none, in, out or both. Paper: in."""
    whitening_eps: float = 1e-5
    """Added to the second moment before its Cholesky factor, > 0. Paper: 1e-5 / 1e-2 / 1e-5."""
    hooi_sweeps: int = 0
    """Sweeps of higher-order orthogonal iteration after HOSVD, >= 0. Ours."""

    @property
    def expert_rank(self) -> int | float | None:
        """``rank_expert`` as it is used: a site with one expert has one slice in that mode."""
        return self.rank_expert if self.site == EXPERTS or self.tucker_energy else 1

    @property
    def needs_statistics(self) -> bool:
        """As for all solvers, and to whiten the basis."""
        return super().needs_statistics or self.whitening != "none"

    def ranks(self, experts: int, d_model: int, d_hidden: int) -> tuple[int, int, int] | None:
        """``(re, ro, ri)`` for these sizes; None where ``tucker_energy`` chooses them, which takes the weights.

        Raises:
            HyperParamsError: a rank beyond the size of its mode.
        """
        sizes = {"rank_expert": experts, "rank_out": d_model, "rank_in": d_hidden}
        given = (self.expert_rank, self.rank_out, self.rank_in)
        ranks = [resolve_rank(r, n, name) for r, (name, n) in zip(given, sizes.items(), strict=True) if r is not None]
        return (ranks[0], ranks[1], ranks[2]) if len(ranks) == 3 else None

    def __post_init__(self) -> None:
        for name, default in _RANKS.items():
            if self.tucker_energy:
                fine = getattr(self, name) is None
                self._require(name, fine, "left out, or null, where tucker_energy chooses the ranks")
            elif getattr(self, name) is None:
                setattr(self, name, default)
        super().__post_init__()

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in () if self.tucker_energy else _RANKS:
            self._require_rank(name)
        shares = [share for share in self.tucker_energy if 0 < share <= 1]
        fine = not self.tucker_energy or len(shares) == len(self.tucker_energy) == 3
        self._require("tucker_energy", fine, "empty, or three shares in (0, 1]: expert, output and input mode")
        self._require("whitening", self.whitening in WHITENING, f"one of {', '.join(WHITENING)}")
        self._require("whitening_eps", self.whitening_eps > 0, "greater than 0")
        self._require("hooi_sweeps", self.hooi_sweeps >= 0, "at least 0")
        self._require("metric", self.metric != "covariance", "identity or nullspace for MoTE")


@dataclass(kw_only=True)
class MoEEditHyperParams(SolverHyperParams):
    """MoEEdit: randomised block coordinate descent over experts."""

    variant: str = "paper"
    """paper: as MoEEdit's paper has it. code: as its published code, where that differs: the residual is taken of each
    layer's own output, over the square root of the layers left, and lambda grows by a thousandth of itself with each
    earlier edit. MoEEdit."""
    num_passes: int = 4
    """Passes over all experts, >= 1. Papers: 4 / 10 / 2 for Qwen3-30B / GPT-OSS / Qwen3.6."""
    seed: int = 42
    """Seed of the orders in which experts are visited. MoEEdit's published code: 42."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require("num_passes", self.num_passes >= 1, "at least 1")
        self._require_one_of({"variant": VARIANTS})
        fine = self.variant == "paper" or self.spread == "residual"
        self._require("variant", fine, f"paper unless spread is residual ({self.spread})")


@dataclass(kw_only=True)
class GlobalHyperParams(SolverHyperParams):
    """The exact solver, and MEMIT, AlphaEdit and ROME lifted to experts as settings of it."""

    edits_per_solve: int | None = None
    """Requests solved together; None: all of the batch. MoE-ROME: 1."""
    max_layers: int | None = None
    """Bound on the number of layers. MoE-ROME: 1."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in ("edits_per_solve", "max_layers"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "None or at least 1")
        fine = self.edits_per_solve is None or not self.replay_facts
        self._require("replay_facts", fine, "0 where edits_per_solve is set, as a batch is then several solves")
        if self.max_layers is not None:
            self._require(
                "layers", len(self.layers) <= self.max_layers, f"at most {self.max_layers} for {self.alg_name}"
            )
