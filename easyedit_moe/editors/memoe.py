"""MEMoE (arXiv 2405.19086): the base stays frozen; a bypass adapter beside one FFN learns the edits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.attachment import add_subjects, attach, detach, find_adapter, find_ffn
from easyedit_moe.adapters.moe_adapter import AdapterConfig, Fact, MoEAdapter, base_fingerprint
from easyedit_moe.adapters.training import check_facts, train_adapter
from easyedit_moe.editors.base import Editor, EditResult, provenance
from easyedit_moe.editors.diagnosis import EditDiagnosis, FactDiagnosis, settings_of
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.stages import Stage
from easyedit_moe.errors import AdapterError, EditingWarning, HyperParamsError
from easyedit_moe.facts.anchors import SubjectMatcher
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import MEMoEHyperParams
from easyedit_moe.interrupts import uninterrupted
from easyedit_moe.measure import Stopwatch
from easyedit_moe.moe.activations import kept_for_gradient
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.shapes import outline_of
from easyedit_moe.patches.checks import versions


class Undo(dict[str, Tensor]):
    """What an adapter hands to a host that keeps original weights, of which there are none: an empty dict that undoes
    the edit when the host restores by it.

    Some of a host's loops call it, others go through ``items()`` to copy each into the model: both undo the edit, once.
    Whatever else one does with it, such as to compare or copy it, leaves the edit alone.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        super().__init__()
        self.restore = restore

    def __call__(self) -> None:
        """Undo the edit."""
        self.restore()

    def items(self) -> Any:
        """Undo the edit; no items."""
        self.restore()
        return super().items()


class AdapterPatch:
    """One batch of edits in an attached adapter; undoing it detaches the adapter, or returns it to the batch before.

    Attributes:
        adapter: the attached adapter.
        before: the adapter's state before this batch; None where this batch attached it.
        reports: empty, as no weight of the model was written.
        id: of the adapter's shape and all its facts, this batch's included.
        parent, warnings, metadata: as of other patches.
    """

    def __init__(
        self, adapter: MoEAdapter, before: dict[str, Any] | None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.adapter, self.before = adapter, before
        self.edits = adapter.edits
        self.applied = True
        self.reports: list[Any] = []
        self.id = adapter.id
        self.parent: str | None = None
        self.warnings: list[str] = []
        self.metadata: dict[str, Any] = {**(metadata or {}), "versions": versions()}

    def revert(self, model: nn.Module) -> None:
        """Undo this batch; the base was never changed, and computes bit-equally again once no adapter is left.

        Raises:
            AdapterError: the adapter is not attached to ``model``, or later batches were trained into it.
        """
        if not self.applied or find_adapter(model) is not self.adapter:
            raise AdapterError("The adapter of this edit is not attached to the model, so there is nothing to revert.")
        if self.adapter.edits != self.edits:
            raise AdapterError(
                f"The adapter has learnt {self.adapter.edits - self.edits} more batches since; revert them first."
            )
        self.restore(model)

    def restore(self, model: nn.Module) -> None:
        """As `revert`, whatever happened since; nothing where the adapter is gone already."""
        with held(model), uninterrupted():
            if self.applied and find_adapter(model) is self.adapter:
                if self.before is None:
                    detach(model)
                else:
                    self.adapter.put_back(self.before)
                    matcher = cast(SubjectMatcher, self.adapter.matcher)  # an attached adapter has one
                    add_subjects(model, matcher.tok, self.adapter, [])
            self.applied = False

    def weights_copy(self, model: nn.Module) -> Undo:
        """An empty dict that undoes the edit when it, or its ``items``, is called: there are no original weights."""
        return Undo(lambda: self.restore(model))

    def save(self, path: str | Path) -> None:
        """Write the adapter, with all its batches, to a folder or a .safetensors file; see `MoEAdapter.save`."""
        self.adapter.save(path)


class MEMoEEditor(Editor):
    """Bypass MoE adapter with knowledge-anchor routing, on MoE models and dense ones.

    A model that carries an adapter already is edited further: new facts are trained into it, along with the earlier
    ones where ``replay``: at most ``replay_facts`` of them, drawn anew for each batch. It keeps the newest
    ``max_facts`` facts with their anchors. So a batch costs the same however many there were before it.

    Anchors come from the text alone: the subjects of the edited facts, as whole words, whatever their case and white
    space. ``without_anchor`` says what happens to tokens that no subject precedes. "skip" (the default): the adapter
    adds nothing, so a text that names no edited subject is computed bit-equally to the unedited model, and an edit does
    not reach texts that name its subject otherwise (a nickname, a pronoun alone, a misspelling). "null": a learned
    embedding stands in, so an edit may reach such texts through x_i, and locality rests on the locality term alone.

    The paper gives the equations; where it leaves something open (initialisation, scaling of the anchors, which texts
    the locality term sees, when an anchor begins), what is done here is ours.
    """

    method = "MEMoE"

    hparams: MEMoEHyperParams

    def prepare(self, model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
        """Check that there is an FFN at the layer; LayerError where there is none."""
        find_ffn(model, self.hparams.layers[0])

    @classmethod
    def plan_for(cls, hparams: MEMoEHyperParams, model: nn.Module, workload: Workload) -> MemoryPlan:
        """See `Editor.plan_for`; nothing is written into the base, which may be dense."""
        hp, shapes = hparams, outline_of(model)
        find_ffn(model, hp.layers[0])
        edits = workload.edits_of(hp)
        e, d, width = hp.num_experts, shapes.d_model, hp.expert_width
        numbers = e * (2 * d + width * (2 * d + 1)) + d
        sequences, lengths = min(hp.train_batch_size, edits), workload.lengths
        # Half of its texts are prompts with another fact's subject; a step may come to compute all, where there is one.
        others = edits > 1 or (hp.replay and workload.earlier_edits > 0)
        texts = hp.locality_batch_size - (0 if others else hp.locality_batch_size // 2)
        tokens = texts * hp.locality_max_tokens if hp.locality_weight else 0
        kept = sum(kept_for_gradient(shapes, n, n, n) for n in (sequences * lengths.whole, tokens))
        kept *= shapes.num_layers - 1 - hp.layers[0]
        # Of the facts the log-softmax stays; of the texts those of both models, and what makes their divergence.
        own = shapes.itemsize if shapes.itemsize < 4 else 0
        logits = shapes.vocabulary * (4 * sequences * lengths.target + (5 * 4 + own) * tokens)
        note = f"{numbers:,} trainable numbers, {16 * numbers / 1e9:.3f} GB with optimiser state"
        stages = (
            Stage("attach", 4 * numbers + 4 * edits * d, 0, "the adapter, and an anchor per subject"),
            Stage("train", 0, 3 * 4 * numbers + kept + logits, note),
        )
        settings = {"train_batch_size": sequences, "locality_batch_size": hp.locality_batch_size}
        return MemoryPlan(shapes, tuple(hp.layers), edits, stages, settings, workload.checked_budget())

    def edit_batch(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: list[EditRequest], memory: Any, targets: Any
    ) -> EditResult:
        """Train the adapter, attached first where the model has none; the adapter remembers its facts.

        Raises:
            RequestError: a subject that is not found in its prompt. LayerError: no FFN at the layer. HyperParamsError:
                an attached adapter of other settings, or more facts than ``max_facts``. DataError, NumericalError: see
                `train_adapter`.
        """
        facts = [Fact(r.prompt, r.named_subject, r.target_new) for r in requests]
        find_ffn(model, self.hparams.layers[0])
        watch = Stopwatch()
        found = find_adapter(model)
        if found is not None:
            self._check_same(found)
        adapter = MoEAdapter(self._config(model), self.hparams.seed) if found is None else found
        before = None if found is None else found.state()

        def undo() -> None:
            adapter.generator = None
            if before is not None:
                adapter.put_back(before)
                add_subjects(model, tok, adapter, [])
            elif find_adapter(model) is not None:
                detach(model)

        with intact(model) as hold:
            hold.undo.append(undo)
            if found is None:
                with watch.stage("statistics"):
                    attach(model, tok, adapter.requires_grad_(False))
            earlier = self._kept(adapter, facts)
            add_subjects(model, tok, adapter, [fact.subject for fact in facts])
            check_facts(tok, adapter, facts, self.hparams.context_prefixes, self.hparams.chat)
            adapter.generator = torch.Generator().manual_seed(self.hparams.seed + adapter.edits)
            with watch.stage("solve"):
                replayed = self._replayed(adapter, earlier)
                report = train_adapter(model, tok, adapter, facts, replayed, self.hparams, self.progress)
            adapter.facts, adapter.edits, adapter.generator = (*earlier, *facts), adapter.edits + 1, None
            patch = AdapterPatch(adapter, before, provenance(self.hparams, requests))
            told = zip(requests, report.fact_nll, report.learnt, strict=True)
            learnt = tuple(FactDiagnosis(r.prompt, r.target_new, None, nll, reached, None) for r, nll, reached in told)
            diagnosis = EditDiagnosis(self.method, learnt, steps=report.steps, settings=settings_of(self.hparams))
            return EditResult(patch, watch.seconds, None, [], [report], diagnosis)

    def _kept(self, adapter: MoEAdapter, facts: Sequence[Fact]) -> list[Fact]:
        """The earlier facts that stay beside these; the adapter forgets the others."""
        replaced, most = {fact.prompt for fact in facts}, self.hparams.max_facts
        if len(facts) > most:
            raise HyperParamsError(f"max_facts is {most}, but one batch has {len(facts)} facts. Raise it.")
        earlier = [fact for fact in adapter.facts if fact.prompt not in replaced]
        old = earlier[: max(0, len(earlier) + len(facts) - most)]
        if old:
            warnings.warn(
                f"The adapter keeps {most} facts (max_facts), so the {len(old)} oldest leave it: texts about their "
                "subjects alone are computed as without the edit.",
                EditingWarning,
                stacklevel=2,
            )
            adapter.release(old)
        return earlier[len(old) :]

    def _replayed(self, adapter: MoEAdapter, earlier: list[Fact]) -> list[Fact]:
        """Those of the earlier facts that this batch is trained along with."""
        most = self.hparams.replay_facts
        if len(earlier) <= most:
            return earlier
        draw = torch.Generator().manual_seed(self.hparams.seed + adapter.edits)
        return [earlier[place] for place in sorted(torch.randperm(len(earlier), generator=draw)[:most].tolist())]

    def _config(self, model: nn.Module) -> AdapterConfig:
        hp = self.hparams
        text = text_config(model)
        return AdapterConfig(
            hp.layers[0], text.hidden_size, hp.num_experts, hp.expert_width, hp.top_k, hp.adapter_scale, hp.noise,
            hp.token_weight, hp.use_anchors, hp.without_anchor, base_fingerprint(model),
        )  # fmt: skip

    def _check_same(self, adapter: MoEAdapter) -> None:
        hp, config = self.hparams, adapter.config
        wanted = {
            "layer": hp.layers[0], "num_experts": hp.num_experts, "expert_width": hp.expert_width, "top_k": hp.top_k,
            "scale": hp.adapter_scale, "noise": hp.noise, "token_weight": hp.token_weight,
            "use_anchors": hp.use_anchors, "without_anchor": hp.without_anchor,
        }  # fmt: skip
        other = [f"{n}: {getattr(config, n)!r}, not {v!r}" for n, v in wanted.items() if getattr(config, n) != v]
        if other:
            raise HyperParamsError(
                f"The model carries an adapter of other settings ({'; '.join(other)}). Use its settings to train it "
                "further, or detach it."
            )


apply_memoe_to_model = MEMoEEditor.apply_to_model
