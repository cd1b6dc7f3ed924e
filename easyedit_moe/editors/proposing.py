"""Which hyper-parameters a model gets that no YAML is for: from its config alone, no weight is read.

Layers, ranks and sizes follow rules that give the papers' models the values in their YAMLs; what depends on no size is
taken from the YAML of the nearest of those models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.proposal import Chosen, Proposal
from easyedit_moe.editors.registry import editor_class
from easyedit_moe.errors import HyperParamsError
from easyedit_moe.facts.records import FactSet
from easyedit_moe.factworld import MODEL_NAME
from easyedit_moe.hparams import (
    MEMoEHyperParams,
    MoEHyperParams,
    MoTEHyperParams,
    SolverHyperParams,
    UnKEHyperParams,
    hparams_folder,
    hyperparams_class,
    presets,
)
from easyedit_moe.hparams.files import read_layers
from easyedit_moe.hparams.models import OUTLINES, outline
from easyedit_moe.hparams.overlay import REPLACES, overlaid
from easyedit_moe.hparams.sites import CALLED, EXPERTS, SITES
from easyedit_moe.hparams.sources import descriptions, origin, yaml_comments
from easyedit_moe.moe.config import model_config, text_config
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import checkpoint_dtype, empty_model
from easyedit_moe.moe.shapes import Shapes, shapes_of
from easyedit_moe.statistics.corpus import GENERATED
from easyedit_moe.statistics.generated import SAMPLED_TOKENS
from easyedit_moe.targets.memory import USUAL_SEQUENCES

MOST_LAYERS = 5
"""Layers that are edited at most; as many as the papers edit of Qwen3-30B-A3B."""
LEAST_LAYERS = 3
"""As many as the papers edit of GPT-OSS-20B."""
_NEAREST = "qwen3-30b-a3b"
SMALL = 1024
"""Hidden size below which settings are the bundled model's: by the papers', half of its targets are reached and next to
nothing is written."""
_OF_THE_MODEL = ("alg_name", "model_name", "device", "dtype", "layers", "spread")
_OF_FACTWORLD = (
    "max_length", "context_prefixes", "target_batch_size", "mom2_dataset", "mom2_n_samples", "nullspace_threshold",
    "nullspace_relative", "locality_dataset", "locality_batch_size", "preserve_dataset",
)  # fmt: skip
"""Of the bundled model alone: its corpus and texts, its sizes, and a threshold that carries to no other model."""
_SHOWN = (
    "fact_token", "context_prefixes", "v_lr", "v_num_grad_steps", "v_weight_decay", "clamp_norm_factor", "kl_factor",
    "lambda_reg", "metric", "nullspace_threshold", "low_coverage", "coverage_target", "spread", "num_passes",
    "whitening", "whitening_eps", "lr", "num_steps", "norm_constraint", "rank", "lora_alpha", "train",
    "optim_num_step", "preserve_n_samples", "num_experts", "top_k", "expert_width", "steps", "locality_weight",
)  # fmt: skip
"""Fields that are written out even where they have their default: those that one would want to change."""
LAMBDA_RELATIVE, NULLSPACE_RANK = 0.1, 0.75
"""Of models that no paper has values for; on the bundled one utility hardly changes from 0.01 to 0.3 of the first."""
_SCALE_FREE = "absolute values carry over to no other model (docs/results.md, scale-free settings)"
_CHUNKS = ("target_batch_size", "capture_batch_size", "train_batch_size", "locality_batch_size")


@dataclass(frozen=True)
class Memory:
    """What a device has.

    Attributes:
        name: "cpu" or "cuda".
        free: bytes of one device; None where it is not known.
        devices: how many of them there are.
    """

    name: str
    free: int | None = None
    devices: int = 1

    @staticmethod
    def here() -> Memory:
        """Of this machine: its GPUs, or else the CPU."""
        if not torch.cuda.is_available():
            return Memory("cpu")
        free = min(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        return Memory("cuda", free, torch.cuda.device_count())


def propose(
    model: str,
    method: str,
    facts: FactSet | None = None,
    trust_remote_code: bool = False,
    loaded: nn.Module | None = None,
    memory: Memory | None = None,
    layers: Chosen | None = None,
    site: str = EXPERTS,
) -> Proposal:
    """Hyper-parameters of a method of ours for a model, each with its reason.

    Args:
        model: hub name, folder, or "factworld".
        method: name or alias.
        facts: that will be edited; they decide on the fact token and the batch size.
        trust_remote_code: let code that comes with the checkpoint run.
        loaded: the model where it is in memory already; then no config is read.
        memory: of the device; by default this machine's.
        layers: that are edited, where they were measured; by default those by depth.
        site: what is edited in them, see `easyedit_moe.hparams.sites`.

    Raises:
        DataError: no config by this name. LayoutError, DenseModelError: no experts, or none that can be edited.
        MethodError: an unknown method, or EasyEdit's own. HyperParamsError: a site that is none, or that the method
        can't edit. LayerError: a site that no layer has.
    """
    method = presets.canonical_name(method)
    _check_site(method, site)
    if loaded is None:
        dtype, said = (
            checkpoint_dtype(model, trust_remote_code),
            "as the checkpoint says, so that a patch fits its files",
        )
        empty: nn.Module = empty_model(model, dtype, trust_remote_code)
    else:
        dtype, said = str(next(loaded.parameters()).dtype).removeprefix("torch."), "of the model in memory"
        empty = loaded
    return _Proposing(model, method, empty, facts, memory or Memory.here(), site).proposal(
        Chosen("dtype", dtype, said), trust_remote_code, layers
    )


def _check_site(method: str, site: str) -> None:
    """HyperParamsError for a site that is none, or one that a method does not edit."""
    if site not in SITES:
        raise HyperParamsError(f"site must be one of {', '.join(SITES)}; found {site!r}.")
    if site != EXPERTS and not issubclass(hyperparams_class(method), SolverHyperParams):
        raise HyperParamsError(f"{method} has no setting site; methods that solve in closed form, such as MoTE, do.")


def edits_one_layer(method: str) -> bool:
    """Whether a method of ours takes a single layer; raises MethodError for a name that is none."""
    cls, fixed = hyperparams_class(method), presets.find_method(method).fixed
    return issubclass(cls, (MEMoEHyperParams, UnKEHyperParams)) or fixed.get("max_layers") == 1


def critical_layers(num_layers: int, moe_layers: Sequence[int]) -> list[int]:
    """Layers to edit: those MoE layers that lie about an eighth of the way up, increasing.

    The papers' choices come out for the papers' models: 3-7 of 48, 3-5 of 24, 3-6 of 40. The window ends at 0.15 of the
    depth and holds `LEAST_LAYERS` to `MOST_LAYERS` layers. Where it holds too few MoE layers, those above it are taken,
    then those below; the model's last layer, behind which nothing can read the change, only if there is no other.
    """
    first = max(min(3, num_layers // 8), round(num_layers / 16))
    last = max(round(0.15 * num_layers), first + LEAST_LAYERS - 1)
    first = max(first, last - MOST_LAYERS + 1)
    usable = [layer for layer in sorted(moe_layers) if layer < num_layers - 1] or sorted(moe_layers)
    inside = [layer for layer in usable if first <= layer <= last]
    above, below = [n for n in usable if n > last], [n for n in usable if n < first]
    missing = max(0, min(LEAST_LAYERS, max(1, num_layers // 2)) - len(inside))
    return sorted([*inside, *[*above, *reversed(below)][:missing]])


class _Proposing:
    def __init__(
        self,
        model: str,
        method: str,
        empty: nn.Module,
        facts: FactSet | None,
        memory: Memory,
        site: str = EXPERTS,
    ) -> None:
        self.model, self.method, self.empty, self.facts, self.memory = model, method, empty, facts, memory
        self.row, self.cls = presets.find_method(method), hyperparams_class(method)
        self.fields = {item.name for item in fields(self.cls)}
        self.view = view = MoELayerView(empty, without_weights=True, site=site)
        self.site, self.depth = site, view.num_layers
        self.moe_layers = sorted(view.layers)
        if not self.moe_layers:
            view.require(sorted(view.routed))
        self.shapes: Shapes = shapes_of(empty, self.moe_layers, site)
        self.found: dict[str, Chosen] = {}
        self.notes: list[str] = []

    def proposal(self, dtype: Chosen, trust_remote_code: bool, layers: Chosen | None) -> Proposal:
        """All of it, in the order of the hyper-parameters."""
        nearest = self._nearest()
        self._take([*nearest, *self._defaults({one.name for one in nearest})])
        where = layers or self._layers()
        self._take([Chosen("model_name", self.model, ""), dtype, where, *self._texts(), *self._sizes()])
        self._replace(self._scale_free())
        self._take(self._of_facts())
        if self.site != EXPERTS:
            self._take([Chosen("site", self.site, "asked for")])
        if trust_remote_code:
            self._take([Chosen("trust_remote_code", True, "asked for")])
        self._take([Chosen("device", self.memory.name, self._why_device())])
        plan = self._fitted()
        order = [item.name for item in fields(self.cls) if item.name in self.found]
        values = tuple(self.found[name] for name in order if name != "alg_name")
        return Proposal(self.method, self.model, values, self._about(), plan, tuple(self.notes))

    def _take(self, chosen: Iterable[Chosen]) -> None:
        """Later ones count more; a value that the method itself sets is left to it."""
        self.found |= {one.name: one for one in chosen if one.name in self.fields and one.name not in self.row.fixed}

    def _replace(self, chosen: Iterable[Chosen]) -> None:
        """As `_take`, with what the chosen settings exclude left out."""
        for one in chosen:
            for name in REPLACES.get(one.name, ()):
                self.found.pop(name, None)
            self._take([one])

    def _scale_free(self) -> list[Chosen]:
        """Ridge and null space in the model's own units, unless it is one that a YAML has values for."""
        known = outline(model_config(self.empty).to_dict()) in OUTLINES.values()
        metric = self.row.fixed.get("metric", self.cls.metric if issubclass(self.cls, SolverHyperParams) else None)
        if known or metric not in ("identity", "nullspace"):  # of a covariance metric the ridge is in its units already
            return []
        chosen = [Chosen("lambda_relative", LAMBDA_RELATIVE, f"ours: {_SCALE_FREE}")]
        if metric == "nullspace":
            chosen.append(Chosen("nullspace_rank", NULLSPACE_RANK, f"ours: a share of h; {_SCALE_FREE}"))
        return chosen

    def _nearest(self) -> list[Chosen]:
        """What the YAML of the nearest model says, small or of the same architecture, that depends on no size of it."""
        kind = str(getattr(text_config(self.empty), "model_type", "")).removesuffix("_text")
        papers = (name for name, shape in OUTLINES.items() if shape["model_type"] == kind and name != MODEL_NAME)
        nearest = MODEL_NAME if self.shapes.d_model < SMALL else next(papers, _NEAREST)
        file = hparams_folder() / self.method / f"{nearest}.yaml"
        if not file.is_file():  # a method from elsewhere
            return []
        own, shared, shared_file = read_layers(file)
        reasons = {**({} if shared_file is None else yaml_comments(shared_file)), **yaml_comments(file)}
        told = "the bundled model, which is small, too" if nearest == MODEL_NAME else nearest
        return [
            Chosen(name, value, f"{reasons.get(name, '')}; as for {told}")
            for name, value in overlaid(shared, own).items()
            if name not in _OF_THE_MODEL and not (nearest == MODEL_NAME and name in _OF_FACTWORLD)
        ]

    def _defaults(self, known: set[str]) -> list[Chosen]:
        """Fields that are shown whatever they are, where the nearest YAML, whose names are ``known``, is silent."""
        told = descriptions(self.cls)
        plain = self.cls.from_dict({"alg_name": self.method, "model_name": self.model, "layers": [0]})
        return [
            Chosen(name, getattr(plain, name), f"default. {origin(told.get(name, ''))}")
            for name in _SHOWN
            if name in self.fields and name not in known
        ]

    def _layers(self) -> Chosen:
        window = critical_layers(self.depth, self.moe_layers)
        if issubclass(self.cls, MEMoEHyperParams):
            middle = min(self.moe_layers, key=lambda layer: (abs(layer - self.depth // 2), layer))
            return Chosen("layers", [middle], f"ours: half-way up, of {self.depth} layers")
        where = f"of {self.depth} layers; the depth at which the papers edit (3-7 of 48, 3-5 of 24, 3-6 of 40)"
        if len(self.moe_layers) < self.depth:
            where += f"; {'MoE layers' if self.site == EXPERTS else 'layers with it'} are {_runs(self.moe_layers)}"
        if self.row.depth == "all":
            every = editor_class(self.method).editable_layers(self.view)
            return Chosen("layers", every, f"papers: all that it can edit, {len(every)} of {self.depth} layers")
        if self.row.depth == "last" or edits_one_layer(self.method):
            return Chosen("layers", window[-1:], f"the last of {_runs(window)}, {where}")
        return Chosen("layers", window, where)

    def _texts(self) -> list[Chosen]:
        """What a corpus is needed for comes from the model itself."""
        why = (
            "ours: the model's own samples, so that nothing is downloaded; a file, folder or dataset name does as well"
        )
        most = getattr(text_config(self.empty), "max_position_embeddings", None)
        bound = int(most) if isinstance(most, int) and most > 1 else 512
        chosen = [Chosen(name, GENERATED, why) for name in ("mom2_dataset", "locality_dataset", "preserve_dataset")]
        if bound < 512:
            chosen.append(Chosen("max_length", bound, "the model's context"))
        if not issubclass(self.cls, SolverHyperParams):
            return chosen
        if bound < SAMPLED_TOKENS:
            chosen.append(Chosen("generated_length", bound, "the model's context"))
        sizes, target = self.shapes, 8.0
        wanted = target * sizes.d_hidden * sizes.experts / sizes.active
        count = max(256, 64 * math.ceil(4 * wanted / min(SAMPLED_TOKENS, bound) / 64))
        reason = f"ours: 4 times the {wanted:,.0f} tokens that coverage_target needs if routing is even"
        return [*chosen, Chosen("mom2_n_samples", count, reason)]

    def _sizes(self) -> list[Chosen]:
        """Ranks by the sizes of the tensor, as ours for the papers' models."""
        if not issubclass(self.cls, MoTEHyperParams):
            return []
        e, d, h = self.shapes.experts, self.shapes.d_model, self.shapes.d_hidden
        silent = "ours; the paper is silent"
        return [
            Chosen("rank_expert", min(e, 64), f"{silent}: of E = {e}, as in our YAMLs"),
            Chosen("rank_out", max(d // 4, min(d, 128)), f"{silent}: a quarter of d = {d}, or 128"),
            Chosen("rank_in", max(h // 4, min(h, 256)), f"{silent}: a quarter of h = {h}, or 256"),
            Chosen("spread", "residual", "re-collects keys at each layer; the paper's update spread edits less well "
                   "(docs/results.md, ablations)"),
        ]  # fmt: skip

    def _of_facts(self) -> list[Chosen]:
        if self.facts is None:
            return []
        requests = [record.request for record in self.facts.facts]
        chosen: list[Chosen] = []
        usual = self.cls.batch_size
        if len(requests) < usual:
            chosen.append(Chosen("batch_size", len(requests), f"all of the {len(requests)} facts together"))
        elif len(requests) > usual:
            reason = f"{len(requests)} facts are several batches; earlier ones are kept (docs/results.md, ablations)"
            chosen.append(Chosen("remember_edits", True, reason))
        nameless = sum(request.subject is None for request in requests)
        if nameless and "fact_token" in self.fields:
            reason = f"{nameless} of {len(requests)} facts name no subject"
            chosen.append(Chosen("fact_token", "last", reason))
        if nameless and self.row.needs_subject and "fact_token" not in self.fields:
            self.notes.append(f"{nameless} of {len(requests)} facts name no subject and are refused by {self.method}.")
        return chosen

    def _why_device(self) -> str:
        return "this machine has no GPU" if self.memory.name == "cpu" else "this machine's GPU"

    def _fitted(self) -> MemoryPlan:
        """The plan of one batch; chunk sizes are made smaller where that lets it fit the device."""
        editor = editor_class(self.method)
        plan = editor.plan_for(self._hparams(), self.empty, Workload())
        free = self.memory.free
        if free is None or plan.peak <= free:
            return plan
        budget, spread = free, False
        if plan.shapes.parameters > free and self.memory.devices > 1:
            budget, spread = free * self.memory.devices, True
            several = f"the model's {plan.shapes.parameters / 1e9:.1f} GB are more than one GPU's {free / 1e9:.1f} GB"
            self._take([Chosen("model_parallel", True, several)])
        fitted = editor.plan_for(self._hparams(), self.empty, Workload(budget=budget))
        of = f"{self.memory.devices} GPUs" if spread else "the GPU"
        if not fitted.fits:
            self.notes.append(
                f"This does not fit the {budget / 1e9:.1f} GB that {of} have free; use more devices or device: cpu."
            )
            return fitted
        before = self._hparams()
        for name in _CHUNKS:
            size = fitted.settings.get(name)
            if name in self.fields and size not in (None, getattr(before, name) or USUAL_SEQUENCES):
                self._take([Chosen(name, size, f"fits the {budget / 1e9:.1f} GB that {of} have free")])
        return fitted

    def _hparams(self) -> MoEHyperParams:
        values: Mapping[str, Any] = {one.name: one.value for one in self.found.values()}
        return self.cls.from_dict({"alg_name": self.method, **values}, f"{self.method} on {self.model}")

    def _about(self) -> str:
        sizes, kind = self.shapes, getattr(model_config(self.empty), "model_type", "")
        return (
            f"{kind}: {self.depth} layers, {CALLED[self.site]} in {len(self.moe_layers)} of them; E = {sizes.experts}, "
            f"K = {sizes.active}, d = {sizes.d_model}, h = {sizes.d_hidden}."
        )


def _runs(layers: Sequence[int]) -> str:
    """Such as 3-5, 7 for 3, 4, 5, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def named_proposal(path: str | Path) -> Proposal | None:
    """The proposal for "<METHOD>/<hub name or folder>", where that names no YAML file; None for any other text.

    Raises:
        DataError, LayoutError: see `propose`.
    """
    method, _, model = str(path).partition("/")
    own = [*(row.name for row in presets.own_methods()), *presets.ALIASES]
    if method not in own or not model or Path(model).suffix in (".yaml", ".yml"):
        return None
    return propose(model, method)
