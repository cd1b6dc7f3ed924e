"""Training an attached adapter: the target's NLL, a locality term and load balancing; the base stays frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.moe_adapter import (
    AdapterRouting,
    Fact,
    MoEAdapter,
    balance_loss,
    recorded_routing,
    switched_off,
)
from easyedit_moe.errors import RequestError, not_finite
from easyedit_moe.evaluation.scoring import answer_logits, score_only
from easyedit_moe.facts.anchors import NO_ANCHOR, SubjectMatcher
from easyedit_moe.facts.tokens import collate, encode_context, encode_pair, encode_text, pad_id, subject_span
from easyedit_moe.hparams import MEMoEHyperParams
from easyedit_moe.interrupts import do_all
from easyedit_moe.moe.capture import frozen_parameters, hooks, inference_mode_of, model_device
from easyedit_moe.progress import progress_bar
from easyedit_moe.statistics.generated import corpus_texts

REACHED = 0.5
"""NLL in nats per token below which an edit counts as reached."""


@dataclass(frozen=True)
class AdapterReport:
    """What training came to.

    Attributes:
        nll: mean NLL of the targets of this batch's edits after their bare prompts, without noise.
        reached: edits whose NLL is below `REACHED`.
        locality: KL(frozen, edited) in nats per token, at the last step.
        balance: load-balancing term, at the last step (1: even, E: all on one expert).
        load: share of the edits' routed tokens that each expert gets, without noise.
        steps: Adam steps.
        replayed: earlier edits that were trained along.
        fact_nll: ``nll`` of each of this batch's edits.
    """

    nll: float
    reached: int
    locality: float
    balance: float
    load: tuple[float, ...]
    steps: int
    replayed: int
    fact_nll: tuple[float, ...] = ()

    @property
    def learnt(self) -> list[bool]:
        """Of each of this batch's edits, whether it counts as reached."""
        return [nll < REACHED for nll in self.fact_nll]


def check_facts(
    tok: PreTrainedTokenizerBase,
    adapter: MoEAdapter,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    chat: bool = False,
) -> None:
    """Every fact's subject must be found in its prompt by the adapter's own matching.

    Raises:
        RequestError: an anchor that is never found.
    """
    if not adapter.config.use_anchors:
        return
    matcher = cast(SubjectMatcher, adapter.matcher)  # an attached adapter has one
    for number, fact in enumerate(facts):
        for prefix in ("", *prefixes):
            found = matcher.anchors(encode_context(tok, prefix + fact.prompt, chat))
            if found[-1] == NO_ANCHOR or adapter.subjects[found[-1]] != fact.subject:
                seen = "nothing" if found[-1] == NO_ANCHOR else repr(adapter.subjects[found[-1]])
                raise RequestError(
                    f"Request {number}: the anchor of {prefix + fact.prompt!r} should be its subject {fact.subject!r}, "
                    f"but {seen} is found there as a whole word. Give the subject as the prompt writes it."
                )


def train_adapter(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    adapter: MoEAdapter,
    facts: Sequence[Fact],
    earlier: Sequence[Fact],
    hparams: MEMoEHyperParams,
    progress: bool = True,
) -> AdapterReport:
    """Fit an attached adapter to ``facts``, and to ``earlier`` ones where ``hparams.replay``.

    Dropout is off, and only the adapter's parameters change.

    Raises:
        DataError: unusable locality texts. NumericalError: a loss that is not finite.
    """
    with _training_modes(model, adapter):
        job = _Training(model, tok, adapter, facts, earlier if hparams.replay else [], hparams)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=hparams.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, hparams.steps)
        with progress_bar(hparams.steps, "MEMoE", "step", progress) as bar:
            for _ in range(hparams.steps):
                loss, locality, balance = job.loss()
                if not torch.isfinite(loss):
                    raise not_finite("The loss of the adapter is not finite")
                optimizer.zero_grad()
                loss.backward()
                if not torch.isfinite(nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)):
                    raise not_finite("The gradient of the adapter is not finite")
                optimizer.step()
                schedule.step()
                bar.update()
        adapter.eval()
        nll, load = job.result()
    reached, replayed = int((nll < REACHED).sum()), len(job.facts) - len(facts)
    return AdapterReport(
        float(nll.mean()), reached, float(locality), float(balance), load, hparams.steps, replayed, tuple(nll.tolist())
    )


class _Training:
    def __init__(
        self, model: nn.Module, tok: PreTrainedTokenizerBase, adapter: MoEAdapter, facts: Sequence[Fact],
        earlier: Sequence[Fact], hparams: MEMoEHyperParams,
    ) -> None:  # fmt: skip
        self.model, self.tok, self.adapter, self.hparams = model, tok, adapter, hparams
        self.facts = [*facts, *earlier]
        self.new = len(facts)
        self.rows = [
            [encode_pair(tok, prefix + fact.prompt, fact.target_new, fact.subject, hparams.chat)
             for prefix in ("", *hparams.context_prefixes)]
            for fact in self.facts
        ]  # fmt: skip
        self.spans = [subject_span(fact.prompt, fact.subject) for fact in self.facts]
        self.prompts = {fact.prompt for fact in self.facts}
        self.texts: list[str] = []
        self.answers: list[int] = []
        if hparams.locality_weight:
            self.answers = self._frozen_answers()
            with switched_off(adapter):
                self.texts = corpus_texts(
                    hparams.locality_dataset, hparams.locality_n_samples, model, tok, hparams.locality_max_tokens
                )
        self.generator = torch.Generator().manual_seed(hparams.seed)
        self.order: list[int] = []

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Total, locality and balance of one step."""
        hp = self.hparams
        while len(self.order) < min(hp.train_batch_size, len(self.facts)):
            self.order += torch.randperm(len(self.facts), generator=self.generator).tolist()
        chosen = [self.order.pop(0) for _ in range(min(hp.train_batch_size, len(self.facts)))]
        contexts = self._draws(len(self.rows[0]), len(chosen))  # every fact has as many
        with recorded_routing(self.adapter) as seen:
            nll = self._nll([self.rows[i][c] for i, c in zip(chosen, contexts, strict=True)]).mean()
        balance = balance_loss(*_stacked(seen))
        locality = self._locality() if hp.locality_weight else nll.new_zeros(())
        total = nll + hp.locality_weight * locality + hp.balance_weight * balance
        return total, locality.detach(), balance.detach()

    @torch.no_grad()
    def result(self) -> tuple[Tensor, tuple[float, ...]]:
        """NLL of each new edit after its bare prompt, and the load of each expert."""
        size, rows = self.hparams.train_batch_size, [self.rows[i][0] for i in range(self.new)]
        with recorded_routing(self.adapter) as seen:
            nll = torch.cat([self._nll(rows[i : i + size]) for i in range(0, len(rows), size)])
        used = (_stacked(seen)[0] > 0).float().sum(0)
        return nll, tuple((used / used.sum()).tolist())

    def _draws(self, count: int, number: int = 1) -> list[int]:
        """Numbers below ``count``."""
        drawn: list[int] = torch.randint(count, (number,), generator=self.generator).tolist()
        return drawn

    def _nll(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Mean NLL per target token of each row."""
        logits, wanted = answer_logits(self.model, rows, pad_id(self.tok))
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=-100)
        return losses.sum(1) / (wanted != -100).sum(1)

    def _locality(self) -> Tensor:
        """KL(frozen, edited) in nats per token on texts that the edits should leave alone.

        Half of them are prompts of other edits with this edit's subject put in ("swaps"). Where the frozen model
        answers such a prompt as it answers the edit's own, the prompt is taken for a paraphrase and does not count.
        """
        swaps, plain = self._swaps(), self._texts()
        batch = collate(swaps[0] + plain, pad_id(self.tok), str(model_device(self.model)))
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        with torch.no_grad(), switched_off(self.adapter):
            frozen = self.model(**inputs).logits.float().log_softmax(-1)
        edited = self.model(**inputs).logits.float().log_softmax(-1)
        kl = (frozen.exp() * (frozen - edited)).sum(-1)
        mask = batch.mask.to(kl.device, copy=True)
        row = torch.arange(len(swaps[0]), device=kl.device)
        last = frozen[row, batch.lengths[: len(row)].to(kl.device) - 1]
        paraphrase = last.argmax(-1) == torch.tensor(swaps[1], dtype=torch.long, device=kl.device)
        mask[: len(row)] *= ~paraphrase[:, None]
        return (kl * mask).sum() / mask.sum().clamp_min(1)

    def _swaps(self) -> tuple[list[list[int]], list[int]]:
        """Token ids of prompts with another edit's subject, and the frozen model's answer to that edit's own prompt."""
        rows, answers = [], []
        for _ in range(self.hparams.locality_batch_size // 2):
            asked, about = self._draws(len(self.facts), 2)
            start, end = self.spans[asked]
            prompt = self.facts[asked].prompt
            text = prompt[:start] + self.facts[about].subject + prompt[end:]
            if text not in self.prompts:
                rows.append(encode_context(self.tok, text, self.hparams.chat))
                answers.append(self.answers[about])
        return rows, answers

    def _texts(self) -> list[list[int]]:
        """Texts of the corpus. A subject is put before them, since an adapter that skips is not there without one."""
        hp, rows = self.hparams, []
        skip = self.adapter.config.without_anchor == "skip"
        for number in range(hp.locality_batch_size - hp.locality_batch_size // 2):
            subject = self.facts[self._draws(len(self.facts))[0]].subject
            text = self.texts[self._draws(len(self.texts))[0]]
            if number % 4 == 0:
                text = f"{subject} is a"
            elif skip or number % 2:
                text = f"{subject}. {text}"
            rows.append(encode_text(self.tok, text)[: hp.locality_max_tokens])
        return rows

    @torch.no_grad()
    def _frozen_answers(self) -> list[int]:
        """The frozen model's next token after each edit's bare prompt."""
        size, answers = self.hparams.train_batch_size, []
        with switched_off(self.adapter):
            for i in range(0, len(self.rows), size):
                rows = [contexts[0][0] for contexts in self.rows[i : i + size]]
                batch = collate(rows, pad_id(self.tok), str(model_device(self.model)))
                with hooks() as handles:
                    handles.append(score_only(self.model, batch.lengths[:, None] - 1))
                    out = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                answers += out.logits[:, 0].argmax(-1).tolist()
        return answers


def _stacked(seen: Sequence[AdapterRouting]) -> tuple[Tensor, Tensor]:
    return torch.cat([r.gates for r in seen]), torch.cat([r.probability for r in seen])


@contextmanager
def _training_modes(model: nn.Module, adapter: MoEAdapter) -> Iterator[None]:
    """Dropout off, the base frozen, the adapter's noise on; afterwards every flag is as before."""
    with inference_mode_of(model), frozen_parameters(model), torch.enable_grad():
        try:
            adapter.train()
            adapter.requires_grad_(True)
            yield
        finally:
            do_all([adapter.zero_grad])
