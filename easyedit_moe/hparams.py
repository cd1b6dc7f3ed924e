"""Hyper-parameters: closed dataclasses, read from and written to YAML.

Names are EasyEdit's where EasyEdit has one. An unknown key, a wrong type or a value out of range is an error; so is a
value that contradicts the method named by ``alg_name`` (see :mod:`easyedit_moe.presets`).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import yaml

from easyedit_moe import presets
from easyedit_moe.errors import HyperParamsError, did_you_mean
from easyedit_moe.nullspace import LOW_COVERAGE
from easyedit_moe.tokens import FACT_TOKENS
from easyedit_moe.tucker import WHITENING

METRICS = ("identity", "nullspace", "covariance")
SPREADS = ("residual", "update")
ORDERS = ("minibatch", "depth_first")
WITHOUT_ANCHOR = ("skip", "null")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class MoEHyperParams:
    """What all methods share."""

    methods: ClassVar[tuple[str, ...]] = ()

    alg_name: str
    """Method, one of the class's ``methods``."""
    model_name: str
    """Hub name or folder of the model; "factworld" is the bundled one."""
    layers: list[int]
    """Critical layers, increasing. Papers: Qwen3-30B-A3B 3-7, GPT-OSS-20B 3-5, Qwen3.6-35B-A3B 3-6."""
    device: int | str = "cpu"
    """Device to load on: "cpu", "cuda", "cuda:1" or a GPU's number."""
    model_parallel: bool = False
    """Spread the model over all devices (``device_map="auto"``)."""
    dtype: str = "bfloat16"
    """Dtype to load the model in: float32, bfloat16 or float16. Editing arithmetic is float32 or better anyway."""
    batch_size: int = 50
    """Requests per edit in ``batch_edit``. Papers: 50."""
    max_length: int = 512
    """Tokens at which a text of the statistics corpus, or an evaluation prompt, is cut."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise HyperParamsError("MoEHyperParams is abstract; use the class of your method.")
        self.alg_name = presets.canonical_name(str(self.alg_name))
        if self.alg_name not in self.methods:
            raise HyperParamsError(
                f"{type(self).__name__} is for {', '.join(self.methods)}; found alg_name {self.alg_name!r}."
            )
        for name, value in presets.METHODS[self.alg_name].items():
            if getattr(self, name) != value:
                raise HyperParamsError(
                    f"{self.alg_name} means {name} = {value!r}; found {getattr(self, name)!r}. "
                    "Remove the key, or choose the method that you mean."
                )
        self._check_types()
        self._check_ranges()

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            fitted = _fit(value, hints[item.name])
            if fitted is _MISFIT:
                raise HyperParamsError(
                    f"{item.name} must be {_describe(hints[item.name])}; found {value!r} ({type(value).__name__})."
                )
            setattr(self, item.name, fitted)

    def _check_ranges(self) -> None:
        self._require_at_least({"batch_size": 1, "max_length": 1})
        for item in fields(self):
            value = getattr(self, item.name)
            self._require(item.name, not isinstance(value, float) or isfinite(value), "finite")
        self._require_one_of({"dtype": DTYPES})
        ordered = all(b > a for a, b in zip(self.layers, self.layers[1:], strict=False))
        self._require("layers", bool(self.layers) and ordered and min(self.layers) >= 0, "increasing and not empty")

    def _require_at_least(self, lows: Mapping[str, float]) -> None:
        for name, low in lows.items():
            self._require(name, getattr(self, name) >= low, f"at least {low}")

    def _require_one_of(self, choices: Mapping[str, Sequence[Any]]) -> None:
        for name, allowed in choices.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")

    def _require(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise HyperParamsError(f"{name} must be {expected}; found {getattr(self, name)!r}.")

    @classmethod
    def from_hparams(cls, path: str | Path, **overrides: Any) -> MoEHyperParams:
        """Read a YAML file; a name without folder, like ``MoTE/factworld``, means a file that ships with the package.

        Raises:
            HyperParamsError: missing file, not a mapping, unknown key, wrong type or value.
        """
        return cls.from_dict({**read_yaml(path), **overrides}, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "hparams") -> MoEHyperParams:
        """Build from a mapping; fixed settings of the method are filled in."""
        known = {f.name: f for f in fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise HyperParamsError(
                f"{where}: unknown key '{unknown[0]}' for {cls.__name__}.{did_you_mean(str(unknown[0]), known)}"
            )
        missing = [
            n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values
        ]
        if missing:
            raise HyperParamsError(f"{where}: missing {', '.join(missing)}.")
        fixed = presets.METHODS.get(presets.canonical_name(str(values["alg_name"])), {})
        return cls(**{**{k: v for k, v in fixed.items() if k in known}, **values})

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for YAML or JSON."""
        return asdict(self)

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields to a YAML file."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


@dataclass(kw_only=True)
class SolverHyperParams(MoEHyperParams):
    """What all solvers for expert weights share. Paper values: MoTE (arXiv 2605.16686), MoEEdit (arXiv 2602.10965)."""

    fact_token: str = "subject_last"
    """Where the fact sits: subject_last, subject_first, last or subject_first_after_last."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts put before each prompt, for targets and keys alike; the bare prompt always counts too. Ours."""
    v_lr: float = 0.1
    """Adam's learning rate for target vectors, > 0. Papers: Qwen 0.1, GPT-OSS 0.2."""
    v_num_grad_steps: int = 25
    """Adam steps, >= 1. Papers: Qwen 25, GPT-OSS 50."""
    v_loss_layer: int | None = None
    """Layer whose output is read as logits; only the last one is supported, so None or its index."""
    v_weight_decay: float = 0.5
    """Weight of ``||delta|| / ||h||^2``, >= 0. MoEEdit: 0.5."""
    clamp_norm_factor: float = 0.75
    """Bound on ``||delta|| / ||h||``, > 0. MoEEdit: 0.75."""
    kl_factor: float = 0.0625
    """Weight of the KL term on "{subject} is a", >= 0. Papers: 0.0625."""
    early_stop_loss: float = 0.05
    """A request whose target loss falls below stops, >= 0. As in MEMIT and AlphaEdit."""
    target_batch_size: int = 256
    """Token sequences per forward while optimising targets, >= 1; halved where memory runs out. Ours."""
    target_cache_dir: str | None = None
    """Folder in which target vectors are kept per request; None: they are found anew each time. Ours."""
    capture_batch_size: int = 64
    """Token sequences per forward while capturing keys, >= 1. Ours."""
    mom2_dataset: str = "wikipedia"
    """Statistics corpus: a file, "factworld" or a dataset name. Papers: Wikipedia."""
    mom2_n_samples: int = 100000
    """Texts of the corpus to use at most, >= 1. Papers: 100 000."""
    coverage_target: float | None = 8.0
    """Statistics of a layer stop once each of its experts has this many times d_hidden tokens; None: after
    ``mom2_n_samples`` texts whatever the coverage, as in the papers. Ours."""
    mom2_dtype: str = "float32"
    """Dtype of the sums: float32 or float64."""
    stats_dir: str = "./data/stats"
    """Folder of cached statistics."""
    metric: str = "nullspace"
    """Metric M of the objective: identity (no null space), nullspace or covariance."""
    nullspace_threshold: float = 0.02
    """Eigenvalues up to this span the null space, >= 0. Papers: 0.02, absolute."""
    nullspace_relative: bool = False
    """Read the threshold as a share of each expert's largest eigenvalue. Ours."""
    covariance_ridge: float = 1e-3
    """Share of the mean variance added to each covariance's diagonal, >= 0. Ours."""
    low_coverage: str = "keep"
    """What becomes of experts with fewer than ``min_coverage`` tokens: keep, identity, pooled or frozen. Ours."""
    min_coverage: int = 1
    """Tokens an expert needs for its own statistics to count, >= 0. Ours."""
    lambda_reg: float = 1.0
    """Ridge lambda, >= 0. MoTE: 0.1 / 1 / 0.01 for Qwen3-30B / GPT-OSS / Qwen3.6; MoEEdit: 1."""
    spread: str = "residual"
    """residual: re-collect keys per layer, residual over layers left. update: solve at the last layer, spread."""
    remember_edits: bool = False
    """Keep the keys of earlier sequential batches as columns with zero residual."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least(
            {
                "v_num_grad_steps": 1, "target_batch_size": 1, "capture_batch_size": 1, "mom2_n_samples": 1,
                "min_coverage": 0, "v_weight_decay": 0, "kl_factor": 0, "early_stop_loss": 0,
                "nullspace_threshold": 0, "covariance_ridge": 0, "lambda_reg": 0,
            }
        )  # fmt: skip
        for name in ("v_lr", "clamp_norm_factor"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        fine = self.coverage_target is None or self.coverage_target > 0
        self._require("coverage_target", fine, "None or greater than 0")
        self._require_one_of(
            {
                "fact_token": FACT_TOKENS, "metric": METRICS, "spread": SPREADS, "low_coverage": LOW_COVERAGE,
                "mom2_dtype": ("float32", "float64"),
            }
        )  # fmt: skip
        if self.nullspace_relative:
            self._require("nullspace_threshold", self.nullspace_threshold <= 1, "at most 1 where it is relative")


@dataclass(kw_only=True)
class MoTEHyperParams(SolverHyperParams):
    """MoTE: ridge on a Tucker core. The paper does not state its ranks; ours are explicit."""

    methods: ClassVar[tuple[str, ...]] = ("MoTE",)

    rank_expert: int | float = 1.0
    """Rank of the expert mode: an int, or a fraction of E. Ours."""
    rank_out: int | float = 1.0
    """Rank of the output mode: an int, or a fraction of d. Ours."""
    rank_in: int | float = 0.5
    """Rank of the input mode: an int, or a fraction of h. Ours."""
    whitening: str = "in"
    """none, in, out or both. Paper: in."""
    whitening_eps: float = 1e-5
    """Added to the second moment before its Cholesky factor, > 0. Paper: 1e-5 / 1e-2 / 1e-5."""
    hooi_sweeps: int = 0
    """Sweeps of higher-order orthogonal iteration after HOSVD, >= 0. Ours."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in ("rank_expert", "rank_out", "rank_in"):
            rank = getattr(self, name)
            fine = 0 < rank <= 1 if isinstance(rank, float) else rank >= 1
            self._require(name, fine, "a whole number from 1, or a fraction in (0, 1]")
        self._require("whitening", self.whitening in WHITENING, f"one of {', '.join(WHITENING)}")
        self._require("whitening_eps", self.whitening_eps > 0, "greater than 0")
        self._require("hooi_sweeps", self.hooi_sweeps >= 0, "at least 0")
        self._require("metric", self.metric != "covariance", "identity or nullspace for MoTE")


@dataclass(kw_only=True)
class MoEEditHyperParams(SolverHyperParams):
    """MoEEdit: randomised block coordinate descent over experts."""

    methods: ClassVar[tuple[str, ...]] = ("MoEEdit-BCD", "BCD+speedup")

    num_passes: int = 4
    """Passes over all experts, >= 1. Papers: 4 / 10 / 2 for Qwen3-30B / GPT-OSS / Qwen3.6."""
    seed: int = 42
    """Seed of the orders in which experts are visited. Published code: 42."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require("num_passes", self.num_passes >= 1, "at least 1")


@dataclass(kw_only=True)
class GlobalHyperParams(SolverHyperParams):
    """The exact solver, and MEMIT, AlphaEdit and ROME lifted to experts as settings of it."""

    methods: ClassVar[tuple[str, ...]] = ("Global", "Global+speedup", "MoE-MEMIT", "MoE-AlphaEdit", "MoE-ROME")

    edits_per_solve: int | None = None
    """Requests solved together; None: all of the batch. MoE-ROME: 1."""
    max_layers: int | None = None
    """Bound on the number of layers. MoE-ROME: 1."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in ("edits_per_solve", "max_layers"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "None or at least 1")
        if self.max_layers is not None:
            self._require(
                "layers", len(self.layers) <= self.max_layers, f"at most {self.max_layers} for {self.alg_name}"
            )


@dataclass(kw_only=True)
class TrainingHyperParams(MoEHyperParams):
    """What the methods share that minimise the NLL of the new answers by gradient descent."""

    lr: float = 1e-3
    """Adam's learning rate, > 0. Papers: FT and FT-L 1e-3; AdaLoRA 5e-3 / 5e-4."""
    num_steps: int = 25
    """Passes over the facts of a batch (of one fact, for depth_first), >= 1. Papers: 25."""
    weight_decay: float = 0.0
    """Adam's weight decay, >= 0. EasyEdit: 0."""
    order: str = "minibatch"
    """minibatch: all facts in random batches, again and again. depth_first: one fact after the other, as of old."""
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
        self._require_at_least({"num_steps": 1, "weight_decay": 0, "train_batch_size": 1, "early_stop_loss": 0})
        self._require("lr", self.lr > 0, "greater than 0")
        self._require_one_of({"order": ORDERS})


@dataclass(kw_only=True)
class FTHyperParams(TrainingHyperParams):
    """Fine-tuning of the experts' down-projections."""

    methods: ClassVar[tuple[str, ...]] = ("MoE-FT", "MoE-FT-L")

    norm_constraint: float | None = 1e-3
    """Bound on the change of each weight, > 0; None for MoE-FT. Papers: 1e-3 for FT-L."""
    experts: str = "all"
    """all: each expert that an example reaches; routed: those that the router picks for the fact tokens. Ours."""
    fact_token: str = "subject_last"
    """The token whose experts are meant by routed."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_one_of({"experts": ("all", "routed"), "fact_token": FACT_TOKENS})
        if self.alg_name == "MoE-FT-L":
            bound = self.norm_constraint
            self._require("norm_constraint", bound is not None and bound > 0, "greater than 0 for MoE-FT-L")


@dataclass(kw_only=True)
class LoRAHyperParams(TrainingHyperParams):
    """Low-rank adapters by peft, merged after training."""

    methods: ClassVar[tuple[str, ...]] = ("MoE-LoRA", "AdaLoRA")

    lr: float = 5e-3
    rank: int = 8
    """Rank per expert or module, >= 1; for AdaLoRA the mean rank in the end. Papers: 8."""
    lora_alpha: float = 32.0
    """Adapters are scaled by alpha / rank, > 0. Papers: 32."""
    train: str = "down_projections"
    """What MoE-LoRA adapts: down_projections, or experts for the gate and up projections as well. Ours."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the modules that AdaLoRA adapts, like q_proj; empty: every linear layer beside the MoE block. Ours."""
    orth_reg_weight: float = 0.5
    """Weight of AdaLoRA's orthogonality term, >= 0. AdaLoRA (arXiv 2303.10512), peft: 0.5."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require_at_least({"rank": 1, "orth_reg_weight": 0})
        self._require("lora_alpha", self.lora_alpha > 0, "greater than 0")
        self._require_one_of({"train": ("down_projections", "experts")})


@dataclass(kw_only=True)
class UnKEHyperParams(MoEHyperParams):
    """UnKE (arXiv 2405.15349). Stage 1 has the solvers' names (v_...); stage 2 fits the layer."""

    methods: ClassVar[tuple[str, ...]] = ("UnKE",)

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
    """Stage 1: a request whose loss falls below stops, >= 0."""
    target_batch_size: int = 256
    """Stage 1: token sequences per forward, >= 1. Ours."""
    lr: float = 2e-4
    """Stage 2: Adam's learning rate for the layer's parameters, > 0. Papers: 2e-4 / 1e-4."""
    optim_num_step: int = 50
    """Stage 2: Adam steps, >= 1. Papers: 50."""
    train: str = "experts"
    """What stage 2 trains: experts (all parameters of the routed experts), down_projections, or layer (all of the
    decoder layer, router and attention included, which is what UnKE does on dense models)."""
    preserve_dataset: str = "wikipedia"
    """Texts on which the layer is to stay as it is: a file, "factworld" or a dataset name. UnKE: Alpaca."""
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
                "target_batch_size": 1, "optim_num_step": 1, "preserve_n_samples": 0, "preserve_weight": 0,
                "train_batch_size": 1,
            }
        )  # fmt: skip
        for name in ("v_lr", "clamp_norm_factor", "lr"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require_one_of({"fact_token": FACT_TOKENS, "train": ("experts", "down_projections", "layer")})
        self._require("layers", len(self.layers) == 1, "a single layer for UnKE")


@dataclass(kw_only=True)
class MEMoEHyperParams(MoEHyperParams):
    """MEMoE (arXiv 2405.19086). Its equations are the paper's; all defaults are ours."""

    methods: ClassVar[tuple[str, ...]] = ("MEMoE",)

    num_experts: int = 4
    """E, experts of the adapter, >= 1."""
    top_k: int = 1
    """Experts per token, 1..num_experts."""
    expert_width: int = 256
    """Hidden width of one expert, >= 1."""
    adapter_scale: float = 1.0
    """lambda, the weight of the adapter's output, > 0."""
    token_weight: float = 1.0
    """Weight of x_i beside the anchor in the gate's input, >= 0. Paper: 1; 0 routes by the anchor alone."""
    use_anchors: bool = True
    """Find the subjects of edited facts in texts. False: every token has the null embedding (needs "null")."""
    without_anchor: str = "skip"
    """Tokens without an anchor: "skip" leaves them to the FFN, bit-equal; "null" gives them a learned embedding."""
    steps: int = 100
    """Adam steps per batch of edits, >= 1."""
    lr: float = 1e-3
    """Adam's learning rate, falling linearly to a tenth, > 0."""
    noise: float = 0.1
    """Standard deviation of eps in the gate while training, >= 0."""
    locality_weight: float = 3.0
    """Weight of KL(frozen model, edited model) on texts that say nothing of the edits, >= 0."""
    balance_weight: float = 0.1
    """Weight of the load-balancing term, >= 0."""
    locality_dataset: str = "wikipedia"
    """Texts for the locality term: a file, "factworld" or a dataset name."""
    locality_n_samples: int = 1000
    """Texts of it to use, >= 1."""
    locality_max_tokens: int = 32
    """Tokens at which such a text is cut, >= 1."""
    locality_batch_size: int = 16
    """Such texts per step, >= 1."""
    context_prefixes: list[str] = field(default_factory=list)
    """Texts of which one is put before the prompt at a part of the steps, evenly with the bare prompt."""
    train_batch_size: int = 64
    """Edits per step, >= 1."""
    replay: bool = True
    """Train earlier sequential batches along with the new one."""
    seed: int = 0
    """Seed of the adapter's initialisation, the noise and the order of texts."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._require("layers", len(self.layers) == 1, "exactly one layer for MEMoE")
        self._require_at_least(
            {
                "num_experts": 1, "expert_width": 1, "steps": 1, "locality_n_samples": 1, "locality_max_tokens": 1,
                "locality_batch_size": 1, "train_batch_size": 1, "token_weight": 0, "noise": 0, "locality_weight": 0,
                "balance_weight": 0,
            }
        )  # fmt: skip
        for name in ("lr", "adapter_scale"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require("top_k", 1 <= self.top_k <= self.num_experts, f"in 1..{self.num_experts}, the experts")
        self._require_one_of({"without_anchor": WITHOUT_ANCHOR})
        if not self.use_anchors:
            self._require("without_anchor", self.without_anchor == "null", "null where use_anchors is false")


HYPERPARAMS: tuple[type[MoEHyperParams], ...] = (
    MoTEHyperParams,
    MoEEditHyperParams,
    GlobalHyperParams,
    FTHyperParams,
    LoRAHyperParams,
    UnKEHyperParams,
    MEMoEHyperParams,
)


def hyperparams_class(alg_name: str) -> type[MoEHyperParams]:
    """The dataclass of a method.

    Raises:
        MethodError: unknown method.
    """
    name = presets.canonical_name(alg_name)
    return next(cls for cls in HYPERPARAMS if name in cls.methods)


def load_hyperparams(path: str | Path, **overrides: Any) -> MoEHyperParams:
    """Read a YAML file into the class that its ``alg_name`` asks for."""
    values = {**read_yaml(path), **overrides}
    if not isinstance(values.get("alg_name"), str):
        raise HyperParamsError(f"{path}: missing alg_name.")
    return hyperparams_class(values["alg_name"]).from_dict(values, str(path))


def hparams_folder() -> Path:
    """Folder of the YAML files that ship with the package: ``<METHOD>/<model>.yaml``."""
    installed = Path(__file__).parent / "hparams_yaml"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "hparams"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; see :meth:`MoEHyperParams.from_hparams` for how the path is resolved."""
    candidates = [Path(path), hparams_folder() / str(path), hparams_folder() / f"{path}.yaml"]
    if Path(path).parts[:1] == ("hparams",):
        candidates.append(hparams_folder() / Path(*Path(path).parts[1:]))
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        shipped = sorted(str(p.relative_to(hparams_folder())) for p in hparams_folder().glob("*/*.yaml"))
        raise HyperParamsError(f"The hparams file {path} does not exist.{did_you_mean(str(path), shipped)}")
    try:
        values = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HyperParamsError(f"{found} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise HyperParamsError(f"{found} must hold a mapping of names to values.")
    return values


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` (ints are taken as floats, and YAML's "1e-5" strings too), or ``_MISFIT``."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        exact = next((o for o in options if type(value) is o), None)
        if exact is not None:
            return value
        return next((f for f in (_fit(value, o) for o in options) if f is not _MISFIT), _MISFIT)
    if origin is list:
        if not isinstance(value, list):
            return _MISFIT
        items = [_fit(v, typing.get_args(hint)[0]) for v in value]
        return _MISFIT if _MISFIT in items else items
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _MISFIT
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _MISFIT


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(o) for o in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__
