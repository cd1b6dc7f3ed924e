"""MEMoE (arXiv 2405.19086): the base stays frozen; a bypass adapter beside one FFN learns the edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.attachment import add_subjects, attach, detach, find_adapter, find_ffn
from easyedit_moe.adapters.moe_adapter import AdapterConfig, Fact, MoEAdapter, base_fingerprint
from easyedit_moe.adapters.training import check_facts, train_adapter
from easyedit_moe.editors.base import Editor, EditResult
from easyedit_moe.editors.registry import register_editor
from easyedit_moe.errors import AdapterError, HyperParamsError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MEMoEHyperParams
from easyedit_moe.measure import Stopwatch


class Undo(dict[str, Tensor]):
    """What an adapter hands to a host that keeps original weights: an empty dict, since no weight was changed, and a
    callable that undoes the edit.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        super().__init__()
        self.restore = restore

    def __call__(self) -> None:
        self.restore()


class AdapterPatch:
    """One batch of edits in an attached adapter; undoing it detaches the adapter, or returns it to the batch before.

    Attributes:
        adapter: the attached adapter.
        before: the adapter's state before this batch; None where this batch attached it.
        reports: empty, as no weight of the model was written.
    """

    def __init__(self, adapter: MoEAdapter, before: dict[str, Any] | None) -> None:
        self.adapter, self.before = adapter, before
        self.edits = adapter.edits
        self.applied = True
        self.reports: list[Any] = []

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
        """As :meth:`revert`, whatever happened since; nothing where the adapter is gone already."""
        if self.applied and find_adapter(model) is self.adapter:
            if self.before is None:
                detach(model)
            else:
                self.adapter.put_back(self.before)
                add_subjects(model, self.adapter.matcher.tok, self.adapter, [])
        self.applied = False

    def weights_copy(self, model: nn.Module) -> Undo:
        """An empty dict that can be called to undo the edit: there are no original weights."""
        return Undo(lambda: self.restore(model))

    def save(self, path: str | Path) -> None:
        """Write the adapter, with all its batches, into the folder ``path``; see :meth:`MoEAdapter.save`."""
        self.adapter.save(path)


@register_editor
class MEMoEEditor(Editor):
    """Bypass MoE adapter with knowledge-anchor routing, on MoE models and dense ones.

    A model that carries an adapter already is edited further: new facts are trained into it, along with the earlier
    ones where ``replay``.

    Anchors come from the text alone: the subjects of the edited facts, as whole words, whatever their case and white
    space. ``without_anchor`` says what happens to tokens that no subject precedes. "skip" (the default): the adapter
    adds nothing, so a text that names no edited subject is computed bit-equally to the unedited model, and an edit does
    not reach texts that name its subject otherwise (a nickname, a pronoun alone, a misspelling). "null": a learned
    embedding stands in, so an edit may reach such texts through x_i, and locality rests on the locality term alone.

    The paper gives the equations; where it leaves something open (initialisation, scaling of the anchors, which texts
    the locality term sees, when an anchor begins), what is done here is ours.
    """

    method = "MEMoE"
    hparams_class = MEMoEHyperParams
    edits = "adapter"

    def edit(
        self,
        model: nn.Module,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Any],
        memory: Any = None,
        targets: Any = None,
    ) -> EditResult:
        """See :meth:`Editor.edit`; ``memory`` and ``targets`` are unused, since the adapter remembers its facts.

        Raises:
            RequestError: unusable requests, or a subject that is not found in its prompt. LayerError: no FFN at the
                layer. HyperParamsError: an attached adapter of other settings. DataError, NumericalError: see
                :func:`train_adapter`.
        """
        parsed = parse_requests(requests)
        facts = [Fact(r.prompt, r.subject, r.target_new) for r in parsed]
        find_ffn(model, self.hparams.layers[0])
        watch = Stopwatch()
        adapter = find_adapter(model)
        before = adapter.state() if adapter is not None else None
        if adapter is not None:
            self._check_same(adapter)
        try:
            if adapter is None:
                with watch.stage("statistics"):
                    adapter = MoEAdapter(self._config(model), self.hparams.seed)
                    attach(model, tok, adapter.requires_grad_(False))
            replaced = {fact.prompt for fact in facts}
            earlier = [fact for fact in adapter.facts if fact.prompt not in replaced]
            add_subjects(model, tok, adapter, [fact.subject for fact in facts])
            check_facts(tok, adapter, facts, self.hparams.context_prefixes)
            adapter.generator = torch.Generator().manual_seed(self.hparams.seed + adapter.edits)
            with watch.stage("solve"):
                report = train_adapter(model, tok, adapter, facts, earlier, self.hparams, self.progress)
            adapter.facts = (*earlier, *facts)
            adapter.edits += 1
        except BaseException:
            if before is not None:
                adapter.put_back(before)
                add_subjects(model, tok, adapter, [])
            elif find_adapter(model) is not None:
                detach(model)
            raise
        finally:
            if adapter is not None:
                adapter.generator = None
        return EditResult(AdapterPatch(adapter, before), watch.seconds, None, [], [report])

    def _config(self, model: nn.Module) -> AdapterConfig:
        hp = self.hparams
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
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
