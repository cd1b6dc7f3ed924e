"""``edit --dry-run``: what an edit would do, without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_moe.checkpoints.staging import check_free
from easyedit_moe.editors import editor_class, make_editor
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.editors.statistics_plan import StatisticsPlan, plan_statistics
from easyedit_moe.evaluation.generation import MAX_NEW_TOKENS, check_limit
from easyedit_moe.facts.records import load_facts
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.moe.loading import empty_model, load_tokenizer
from easyedit_moe.workflow.saving import check_saved_kinds
from easyedit_moe.workflow.screening import Screened, check_chat, screen
from easyedit_moe.workflow.settings import choose_hparams, with_batch_size


@dataclass(frozen=True)
class Preview:
    """What `edit` would do.

    Attributes:
        facts: that would be edited, and those that would be refused.
        hparams: all settings.
        memory: plan of the largest batch.
        statistics: plan of what must be gathered first, unless it is in the cache; None where none are needed.
    """

    facts: Screened
    hparams: MoEHyperParams
    memory: MemoryPlan
    statistics: StatisticsPlan | None

    @property
    def batches(self) -> int:
        """How many batches follow each other."""
        return -(-len(self.facts.records) // self.hparams.batch_size)


def preview(
    facts: str | Path,
    model: str = "factworld",
    method: str = "",
    hparams: str | Path | MoEHyperParams | None = None,
    out: str | Path | None = None,
    save: Sequence[str] = ("patch",),
    batch_size: int | None = None,
    strict: bool = False,
    overrides: Mapping[str, Any] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Preview:
    """Check all that can be checked from the facts, the settings, and the model's config and tokenizer.

    The arguments and errors are those of `easyedit_moe.workflow.edit.edit`.
    """
    check_saved_kinds(save, out)
    check_limit(max_new_tokens)
    if out is not None:
        check_free(out)
    read = load_facts(facts, strict)
    settings = choose_hparams(method, model, hparams, with_batch_size(overrides, batch_size))
    tok = load_tokenizer(model, settings.trust_remote_code)
    check_chat(settings, tok)
    screened = screen(read, make_editor(settings, progress=False), tok, strict)
    empty = empty_model(model, settings.dtype, settings.trust_remote_code)
    largest = min(settings.batch_size, len(screened.records))
    earlier = len(screened.records) - largest if getattr(settings, "remember_edits", False) else 0
    memory = editor_class(settings.alg_name).plan_for(settings, empty, Workload(largest, earlier))
    return Preview(screened, settings, memory, plan_statistics(settings, empty))
