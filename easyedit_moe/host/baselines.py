"""EasyEdit's own editors as rows of a comparison, on the same model and requests as ours."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.base import Editor, EditResult
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.training_diagnosis import diagnose_host
from easyedit_moe.errors import HostError, HyperParamsError, PatchError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.host import wise
from easyedit_moe.host.baseline_hparams import CLASSES, BaselineHyperParams
from easyedit_moe.host.baseline_planner import CORPUS_TOKENS, edited_parameters, needs_statistics, plan_baseline
from easyedit_moe.host.caches import HostCaches
from easyedit_moe.host.dense_statistics import (
    holds_projectors,
    holds_statistics,
    input_moments,
    module_of,
    write_layer_statistics,
    write_projectors,
)
from easyedit_moe.host.loading import load
from easyedit_moe.host.padding import name_for_host, padded
from easyedit_moe.host.templates import host_requests
from easyedit_moe.host.wise import State
from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.config import model_config
from easyedit_moe.moe.fingerprint import unedited_fingerprint
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.layers import decoder_stack
from easyedit_moe.moe.model_state import ModelState
from easyedit_moe.statistics.cache import statistics_folder
from easyedit_moe.statistics.corpus import corpus_hash
from easyedit_moe.statistics.generated import SAMPLED_TOKENS, corpus_texts
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.strict_json import digest

logger = logging.getLogger(__name__)

SEED = 42
"""EasyEdit seeds with it on import; its context templates are sampled."""


@dataclass
class HostPatch:
    """What one of EasyEdit's methods did: full original tensors by name, and, if it left more behind, what was there.

    Its flags and hooks are taken off after each edit; LoRA's adapters and WISE's module stay until they are undone.
    """

    originals: dict[str, Tensor]
    state: State | None = None
    reports: list[Any] = field(default_factory=list)
    parent: str | None = None
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Of what it would put back, which is all that is known of an edit by EasyEdit."""
        return digest({name: checksum(original) for name, original in self.originals.items()})[:16]

    def restore(self, model: nn.Module) -> None:
        """Put the originals back, and take off what the method left on the model; nothing the second time."""
        with held(model), uninterrupted(), torch.no_grad():
            if self.state is not None:
                self.state.put_back(model)
            do_all(partial(model.get_parameter(name).copy_, original) for name, original in self.originals.items())
            self.state, self.originals = None, {}

    def revert(self, model: nn.Module) -> None:
        """As `restore`; whether the weights were changed since is not known of EasyEdit's edits."""
        self.restore(model)

    def weights_copy(self, model: nn.Module) -> dict[str, Tensor]:
        """Full original tensors by full parameter name."""
        return dict(self.originals)

    def save(self, path: Any) -> None:
        """EasyEdit's edits are not saved.

        Raises:
            PatchError: always.
        """
        raise PatchError("Edits of EasyEdit's own methods can't be saved as a patch; use the model's save_pretrained.")


class BaselineEditor(Editor):
    """One of EasyEdit's methods with the interface of our editors.

    Its module-level caches are this object's own, and new ones for another model, so neither models nor methods share
    one; flags, hooks, the random state and the tokenizer's settings are as before after each batch, and weights too if
    it fails. Layer statistics and projectors are made from ``hparams.mom2_dataset`` read as ours is (a file,
    a folder, "factworld", a dataset name, "generated") and keyed by the model's fingerprint and the corpus.

    Raises:
        HostError: EasyEdit is not there. HyperParamsError: a key that its class of hyper-parameters does not know, or
            one that is missing.
    """

    hparams: BaselineHyperParams

    def __init__(self, hparams: BaselineHyperParams, progress: bool = True) -> None:
        load()
        self.hparams, self.progress, self.method = hparams, progress, hparams.method
        packed = ".experts" in hparams.values.get("rewrite_module_tmp", "")
        vars(self)["edits"] = "experts" if packed else "dense site"
        self.alg_name = hparams.values["alg_name"]
        self._settings()  # a wrong key shows before statistics are made for it
        self._model: weakref.ref[nn.Module] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._caches = HostCaches()
        self._prepared: tuple[str, dict[str, Any]] | None = None
        self._wrapped: Any = None
        self._asked = 0

    @classmethod
    def plan_for(cls, hparams: BaselineHyperParams, model: nn.Module, workload: Workload) -> MemoryPlan:
        """See `Editor.plan_for`; EasyEdit need not be there."""
        return plan_baseline(hparams, model, workload)

    def prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
        """Check the sites, and write the statistics and projectors that the method reads, for this model.

        Raises:
            LayerError: a site that the model lacks. DataError: no such corpus.
        """
        self._follow(model)
        self._sites(model)
        self._prepare(model, tok)

    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """Edit by EasyEdit's code; seconds of it all stand under "solve", since it does not split.

        Raises:
            LayerError: a site that the model lacks. DataError: no such corpus. HostError: EasyEdit's code failed; its
                own error is the cause.
        """
        self._follow(model)
        watch = Stopwatch()
        sites = self._sites(model)
        flags = _HostState.of(model)
        state: State = flags
        if self.alg_name == "WISE":
            state = wise.WiseState.of(model, self.hparams, state)
        with watch.stage("statistics"):
            label, files = self._prepare(model, tok)
            device = str(next(model.parameters()).device)
            settings = self._settings(**files, model_name=name_for_host(model), device=device)
            if self.alg_name == "WISE":
                wise.begin(model, self.hparams, settings)
        wrapped = self._wrapped if hasattr(model, "peft_config") else None
        if wrapped is not None:  # LoRA goes on with the adapter of the batch before
            sites = [name for name, _ in model.named_parameters() if ".lora_" in name]
        originals = {name: model.get_parameter(name).detach().clone() for name in sites}
        with intact(model) as hold:
            hold.undo.append(lambda: HostPatch(originals, state).restore(model))
            hold.undo.append(partial(setattr, self, "_wrapped", self._wrapped))
            try:
                with watch.stage("solve"), self._caches.installed(), _scope(model, tok, label, self._padding_side()):
                    self._fill_caches(model, settings)
                    edited = self._apply(wrapped or model, model, tok, facts, settings)
            except Exception as error:
                if isinstance(error, (HyperParamsError, MemoryError)):
                    raise
                raise HostError(f"EasyEdit's {self.hparams.method} failed: {type(error).__name__}: {error}") from error
            for parameter in model.parameters():
                parameter.grad = None
            self._wrapped = edited
            if self.alg_name == "WISE":
                flags.put_back_flags()
            elif edited is model:
                state.put_back(model)
            with watch.stage("diagnose"):
                diagnosis = diagnose_host(self.method, facts, model, originals)
            patch = HostPatch(originals) if edited is model else HostPatch(originals, state)
            return EditResult(patch, watch.seconds, diagnosis=diagnosis)

    def _apply(
        self, edited: Any, model: nn.Module, tok: PreTrainedTokenizerBase, facts: list[EditRequest], settings: Any
    ) -> Any:
        """EasyEdit's own call for each group; what it returns last. WISE wants the model, never its own wrapper."""
        apply = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT[self.alg_name]
        options = {"copy": False, "return_orig_weights": True, "keep_original_weight": False}
        for group in self._groups(facts):
            requests, wrapping = self._requests(tok, group)
            edited, _ = apply(model if self.alg_name == "WISE" else edited, wrapping, requests, settings, **options)
        if self.alg_name == "WISE":
            wise.finish(model, self.hparams)
        return edited

    def _follow(self, model: nn.Module) -> None:
        """Caches and statistics of another model are not used on this one."""
        if self._model is None or self._model() is not model:
            self._start_anew()
            self._model = weakref.ref(model)
            self.hparams = self.hparams.named_for(decoder_stack(model)[1])

    def _sites(self, model: nn.Module) -> list[str]:
        """Names of the parameters that the method writes (LoRA adds its own instead)."""
        return list(edited_parameters(model, self.hparams))

    def _prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
        """Statistics files for this model, made once; a later batch sees those of the unedited model."""
        if self._prepared is not None:
            return self._prepared
        values = self.hparams.values
        fingerprint = unedited_fingerprint(model)
        folder = statistics_folder(values.get("stats_dir", "./data/stats"), values["model_name"], fingerprint)
        files: dict[str, Any] = {}
        if needs_statistics(self.hparams):
            files = self._write_statistics(model, tok, folder, fingerprint)
        self._prepared = (folder.name, files)
        return self._prepared

    def _write_statistics(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, folder: Path, fingerprint: str
    ) -> dict[str, Any]:
        values = self.hparams.values
        source, count = values["mom2_dataset"], values["mom2_n_samples"]
        texts = corpus_texts(source, count, model, tok, SAMPLED_TOKENS, folder, fingerprint)
        tokens = [str(encode_text(tok, text)) for text in texts[:8]]
        corpus = corpus_hash([*texts, *tokens, str(CORPUS_TOKENS)])[:16]
        names = [values["rewrite_module_tmp"].format(layer) for layer in values["layers"]]
        paths = {
            name: folder / f"{corpus}_stats" / f"{name}_{values['mom2_dtype']}_mom2_{len(texts)}.npz" for name in names
        }
        threshold = values.get("nullspace_threshold", 0.0)
        layers = "-".join(str(layer) for layer in values["layers"])
        projectors = folder / f"{corpus}_stats" / f"projectors_{layers}_{threshold}.pt"
        wanted = self.alg_name == "AlphaEdit" and not holds_projectors(projectors, len(names))
        if wanted or not all(map(holds_statistics, paths.values())):
            moments = input_moments(model, tok, names, texts, CORPUS_TOKENS)
            for name, path in paths.items():
                write_layer_statistics(path, *moments[name], len(texts))
            if wanted:
                dimensions = write_projectors(projectors, [moments[name] for name in names], threshold)
                logger.info("Null spaces of %s have the dimensions %s.", ", ".join(names), dimensions)
        files = {"stats_dir": str(folder.parent), "mom2_dataset": corpus, "mom2_n_samples": len(texts)}
        return {**files, "P_loc": str(projectors)} if self.alg_name == "AlphaEdit" else files

    def _settings(self, **own: Any) -> Any:
        """EasyEdit's hyper-parameters object; ``own`` stands in for what the file says of this machine.

        Raises:
            HyperParamsError: a key that EasyEdit does not know, or one that is missing.
        """
        cls = getattr(importlib.import_module("easyeditor"), CLASSES[self.alg_name])
        projectors = {"P_loc": ""} if self.alg_name == "AlphaEdit" else {}
        try:
            return cls(**{**projectors, **self.hparams.values, **own, "model_parallel": False})
        except TypeError as error:
            raise HyperParamsError(f"EasyEdit's {cls.__name__} does not take these hparams: {error}") from error

    def _fill_caches(self, model: nn.Module, settings: Any) -> None:
        # EasyEdit makes cache_c only for model names that it knows, and fails with NameError for all others.
        if self.alg_name != "AlphaEdit":
            return
        module: Any = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
        if not module.cache_c_new:
            site = module_of(model, settings.rewrite_module_tmp.format(settings.layers[-1]))
            width = site.get_parameter("weight").shape[1]
            module.cache_c = torch.zeros(len(settings.layers), width, width)
            module.cache_c_new = True

    def _padding_side(self) -> str:
        """The side that the method's arithmetic assumes; padding elsewhere, it would train on the wrong tokens."""
        last = self.hparams.values.get("objective_optimization") == "prompt_last"
        return "left" if self.alg_name in ("LoRA", "WISE") or (self.alg_name == "FT" and not last) else "right"

    def _groups(self, facts: Sequence[EditRequest]) -> list[Sequence[EditRequest]]:
        """ROME and WISE take one request at a time; the others a whole batch."""
        return [[fact] for fact in facts] if self.alg_name in ("ROME", "WISE") else [facts]

    def _requests(
        self, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest]
    ) -> tuple[list[dict[str, Any]], PreTrainedTokenizerBase]:
        requests, wrapping = host_requests(tok, facts, self.alg_name)
        if self.alg_name == "WISE":
            for request in requests:
                request["loc_prompt"] = wise.unrelated_text(tok, self._asked, request["prompt"], request["target_new"])
                self._asked += 1
        return requests, wrapping


@dataclass
class _HostState:
    """What EasyEdit's methods change on a model besides weights: flags, hooks, wrapped layers, gradients."""

    inner: ModelState
    use_cache: Any

    @staticmethod
    def of(model: nn.Module) -> _HostState:
        return _HostState(ModelState.of(model), getattr(model_config(model), "use_cache", None))

    def put_back(self, model: nn.Module) -> None:
        self.inner.put_back_modules()
        if self.use_cache is not None:
            model_config(model).use_cache = self.use_cache
        self.put_back_flags()

    def put_back_flags(self) -> None:
        self.inner.put_back_flags()


@contextmanager
def _scope(model: nn.Module, tok: PreTrainedTokenizerBase, label: str, padding_side: str) -> Iterator[None]:
    """Name, random state and tokenizer settings as EasyEdit needs them; as before afterwards. It prints a lot, too."""
    config = model_config(model)
    name, side = config._name_or_path, tok.padding_side
    config._name_or_path = label
    tok.padding_side = padding_side
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    said, states = io.StringIO(), (random.getstate(), numpy.random.get_state())
    try:
        with padded(tok), torch.random.fork_rng(devices), contextlib.redirect_stdout(said):
            torch.manual_seed(SEED)
            random.seed(SEED)
            numpy.random.seed(SEED)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        config._name_or_path, tok.padding_side = name, side
        logger.debug("EasyEdit printed:\n%s", said.getvalue())
