"""Target vectors z: what the hidden state at a fact token should be, by gradient descent for many requests at once.

The objective is MEMIT's and AlphaEdit's, per request: mean NLL of all target tokens after the prompt (and after each
context prefix plus prompt), plus ``kl_factor`` times KL(edited || original) of the next token at the fact token of
"{subject} is a", plus weight decay, over a shift ``delta`` added to the last critical layer's output at the fact token.
Layers up to that one are run once. n steps make n updates here; in MEMIT's code n - 1, as its last step only scores.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError, not_finite
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.subjects import mentions
from easyedit_moe.facts.tokens import encode_prompt, pad_id
from easyedit_moe.hparams import SolverHyperParams, UnKEHyperParams
from easyedit_moe.moe.capture import frozen_parameters, inference_mode_of
from easyedit_moe.moe.config import context_length
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import Lengths
from easyedit_moe.moe.tails import FactPlaces, RecordedTail, recorded_tail, within_reach
from easyedit_moe.moe.upper_layers import ShiftedSequence, UpperLayers
from easyedit_moe.progress import progress_bar
from easyedit_moe.storage.strict_json import digest
from easyedit_moe.targets.memory import USUAL_SEQUENCES, Room, enough
from easyedit_moe.targets.outcomes import MORE_SEARCH, Outcome, known_warning, missed_warning

logger = logging.getLogger(__name__)

COMPANY = 1e-4
"""Bound on what a target's company changes of it, by its length; at most 1.3e-5 was found after 25 steps (tests)."""
KL_PROMPT = "{} is a"
_FEW = 32


@dataclass(frozen=True)
class TargetSettings:
    """Hyper-parameters of the optimisation, named as in EasyEdit.

    Attributes:
        steps, lr: Adam steps and learning rate.
        kl_factor: weight of the KL term.
        weight_decay: weight of ``||delta|| / ||h||^2``.
        clamp_norm_factor: bound on ``||delta|| / ||h||``.
        early_stop_loss: a request whose loss falls below leaves the batch.
        batch_size: token sequences in one forward; None: 256, or on a GPU as many as half of its free memory holds
            (`easyedit_moe.targets.memory`).
        fact_token: see `easyedit_moe.facts.tokens.encode_prompt`.
        chat: prompts are the user's turn in the tokenizer's template.
    """

    steps: int
    lr: float
    kl_factor: float
    weight_decay: float
    clamp_norm_factor: float
    early_stop_loss: float
    batch_size: int | None
    fact_token: str
    chat: bool = False

    @property
    def usual_size(self) -> int:
        """``batch_size``, or what it is where no memory is asked."""
        return self.batch_size or USUAL_SEQUENCES

    @staticmethod
    def of(hparams: SolverHyperParams | UnKEHyperParams) -> TargetSettings:
        """The settings that hyper-parameters say."""
        hp = hparams
        return TargetSettings(
            hp.v_num_grad_steps, hp.v_lr, hp.kl_factor, hp.v_weight_decay, hp.clamp_norm_factor, hp.early_stop_loss,
            hp.target_batch_size, hp.fact_token, hp.chat,
        )  # fmt: skip


@dataclass(frozen=True)
class FactContext:
    """A place where a fact is asked: ids of (context prefix +) prompt, the fact token's position, the answer's ids."""

    ids: tuple[int, ...]
    fact: int
    answer: tuple[int, ...]


@dataclass(frozen=True)
class TargetVectors:
    """Shifts of T requests.

    Attributes:
        delta: ``[T, d]`` float32; ``z = h + delta`` at the output of the last critical layer.
        initial_nll, final_nll: ``[T]``, mean over contexts of the mean NLL per target token.
        reached: ``[T]`` bool: after the bare prompt, every target token is now the most likely one.
        steps: ``[T]``, updates made.
        known: ``[T]`` bool: as ``reached``, before the first update; None where nobody noted it.
        batch: ``[T]`` int64, a digest of the requests with which each was found in one forward; -1 where nobody noted
            it. In another company a target differs, by the order in which floats are added up: of float32 models on the
            CPU by less than `COMPANY` of its length.
    """

    delta: Tensor
    initial_nll: Tensor
    final_nll: Tensor
    reached: Tensor
    steps: Tensor
    known: Tensor | None = None
    batch: Tensor | None = None

    @property
    def batches(self) -> list[str]:
        """``batch`` as a patch's provenance has it, in hexadecimal; empty texts where nobody noted it."""
        if self.batch is None:
            return [""] * len(self.delta)
        return [f"{number:015x}" if number >= 0 else "" for number in self.batch.tolist()]

    @staticmethod
    def cat(parts: Sequence[TargetVectors]) -> TargetVectors:
        """Those of all requests of ``parts``, one after the other; what one of them lacks, all lack."""
        names = [name for name, value in vars(parts[0]).items() if value is not None]
        names = [name for name in names if all(getattr(one, name) is not None for one in parts)]
        return TargetVectors(**{name: torch.cat([getattr(one, name) for one in parts]) for name in names})

    def rows(self, start: int, stop: int) -> TargetVectors:
        """The targets of requests ``start`` to ``stop``."""
        there = {name: value[start:stop] for name, value in vars(self).items() if value is not None}
        return TargetVectors(**there)

    def taken(self, numbers: Sequence[int]) -> TargetVectors:
        """The targets of these numbers, in this order; one may come several times."""
        if list(numbers) == list(range(len(self.delta))):
            return self
        there = {name: value[list(numbers)] for name, value in vars(self).items() if value is not None}
        return TargetVectors(**there)


def fact_contexts(
    tok: PreTrainedTokenizerBase, request: EditRequest, prefixes: Sequence[str], fact_token: str, chat: bool = False
) -> list[FactContext]:
    """The bare prompt first, then each prefix followed by the prompt; with ``chat`` each as the user's turn."""
    contexts = []
    for prefix in ["", *prefixes]:
        if prefix and request.subject is not None and mentions(prefix, request.subject):
            raise RequestError(
                f"The context prefix {prefix!r} mentions the subject {request.subject!r}; choose another."
            )
        prompt = encode_prompt(tok, prefix + request.prompt, request.subject, fact_token, request.target_new, chat)
        contexts.append(FactContext(prompt.ids, prompt.fact, prompt.answer))
    return contexts


def check_lengths(view: MoELayerView, lengths: Sequence[int]) -> None:
    """Raise `RequestError` where prompt plus target exceed the model's context."""
    limit = context_length(view.model)
    if limit is not None and max(lengths) > limit:
        raise RequestError(
            f"A prompt with its context prefix and target has {max(lengths)} tokens; the model's context has {limit}."
        )


@dataclass(frozen=True)
class _Row:
    """One token sequence: whose shift it gets and where, and the positions whose next token is scored."""

    owner: int
    ids: tuple[int, ...]
    fact: int
    predict: tuple[int, ...]
    labels: tuple[int, ...]
    bare: bool


def compute_targets(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layer: int,
    prefixes: Sequence[str],
    settings: TargetSettings,
    progress: bool = True,
    warn: bool = True,
    **more: Any,
) -> TargetVectors:
    """Optimise the shifts of all requests at the output of ``layer``; see `TargetSearch.targets`.

    ``more`` is ``beside`` and ``first``, as for `TargetSearch.find`.
    """
    return TargetSearch(view, tok, layer, tuple(prefixes), settings, progress, warn).targets(requests, **more)


@dataclass(frozen=True)
class TargetSearch:
    """The search of target vectors at one place of a model.

    Attributes:
        view: of the model.
        tok: its tokenizer.
        layer: at whose output the shifts are added.
        prefixes: context prefixes, each put before every prompt.
        settings: of the optimisation.
        progress: whether to show a bar.
        warn: whether to warn of targets that were missed or known; editors do so themselves, once per edit.
    """

    view: MoELayerView
    tok: PreTrainedTokenizerBase
    layer: int
    prefixes: tuple[str, ...]
    settings: TargetSettings
    progress: bool = True
    warn: bool = True

    def targets(self, requests: Sequence[EditRequest], **more: Any) -> TargetVectors:
        """Shifts of all requests; see the module's docstring, and `find` for what ``more`` may be.

        Warns `TargetNotReachedWarning` for requests whose target is not the most likely answer at the end, and
        `KnownFactsWarning` for those whose target already was at the start.

        Raises:
            RequestError: a subject not in its prompt, or a prompt too long. NumericalError: a loss that is not finite.
        """
        found = self.find(requests, **more)
        if self.warn:
            warn_of_targets(requests, found)
        return found

    def find(
        self,
        requests: Sequence[EditRequest],
        receive: Callable[[Sequence[int], TargetVectors], None] | None = None,
        beside: Sequence[Sequence[EditRequest]] = (),
        first: Sequence[Tensor | None] = (),
    ) -> TargetVectors:
        """As `targets`, without warnings; hands each chunk to ``receive`` when it is done.

        ``receive`` gets the numbers of the chunk's requests and their targets. ``beside`` has, per request, facts that
        lie at the same token and that its shift must serve, too: the objective has the sum of their NLLs, and
        ``final_nll`` (their mean) and ``reached`` are of all of them together. ``first`` has, per request, the state
        ``[d]`` that was at its token before the first edit there: weight decay and clamp are then of the way from that
        state, not from the one that is there now.
        """
        view, tok, settings = self.view, self.tok, self.settings
        others = beside or [()] * len(requests)
        groups = [
            _rows_of(tok, t, [request, *more], self.prefixes, settings)
            for t, (request, more) in enumerate(zip(requests, others, strict=True))
        ]
        check_lengths(view, [len(row.ids) for rows in groups for row in rows])
        results: dict[int, tuple[Tensor, ...]] = {}
        bar = progress_bar(len(groups), "targets", "request", self.progress)
        with inference_mode_of(view.model), frozen_parameters(view.model), bar:
            waiting = sorted(range(len(groups)), key=lambda t: _lengths(groups[t]))
            room = Room.of(view, self.layer) if settings.batch_size is None else None
            limit = enough(sum(map(len, groups))) if room else settings.usual_size
            while waiting:
                size = _chunk_with_room([groups[t] for t in waiting], limit, room)
                chosen = waiting[:size]
                origins = [first[t] if first else None for t in chosen]
                rows = [groups[t] for t in chosen]
                solved = _solve_or_none(view, pad_id(tok), self.layer, rows, settings, bar, origins)
                if solved is None:
                    limit = sum(len(groups[t]) for t in chosen) // 2
                    logger.warning("Memory ran out; going on with at most %d token sequences in one forward.", limit)
                    continue
                batch = torch.full((size,), _batch_number([groups[t] for t in chosen]))
                results.update({t: tuple(value[i] for value in (*solved, batch)) for i, t in enumerate(chosen)})
                if receive is not None:
                    receive(chosen, TargetVectors(*(*solved, batch)))
                waiting = waiting[size:]
        columns = zip(*(results[t] for t in range(len(requests))), strict=True)
        return TargetVectors(*(torch.stack(column) for column in columns))


def _batch_number(groups: Sequence[list[_Row]]) -> int:
    """A digest of what shares a forward, in 60 bits."""
    rows = [[row.ids, row.fact, row.labels] for group in groups for row in group]
    return int(digest(rows)[:15], 16)


def _lengths(rows: list[_Row]) -> tuple[int, int]:
    """What a request costs: tokens from the fact token on, which every step computes, and tokens before."""
    return max(len(row.ids) - row.fact for row in rows), max(row.fact for row in rows)


def _next_chunk(groups: Sequence[list[_Row]], limit: int) -> int:
    """How many of the waiting requests, sorted by length, go into one forward of at most ``limit`` sequences.

    A chunk that is large enough to keep a device busy also ends where padding would make up more than a fifth of it.
    """
    count, sequences, tokens = 0, 0, 0
    for rows in groups:
        more, longest = len(rows), _lengths(rows)[0]
        if count and sequences + more > limit:
            break
        padded = (sequences + more) * longest
        if sequences >= max(limit // 4, _FEW) and padded > 1.25 * (tokens + more * longest):
            break
        count, sequences, tokens = count + 1, sequences + more, tokens + more * longest
    return count


def _chunk_with_room(groups: Sequence[list[_Row]], limit: int, room: Room | None) -> int:
    """As `_next_chunk`, by a limit that is halved until the chunk has room."""
    size = _next_chunk(groups, limit)
    while room is not None and size > 1 and not room.holds(size, *_longest(groups[:size])):
        limit //= 2
        size = _next_chunk(groups, limit)
    return size


def _longest(groups: Sequence[list[_Row]]) -> tuple[int, Lengths]:
    """Contexts of a request at most, and lengths that no sequence exceeds: padding counts, too."""
    rows = [row for group in groups for row in group]
    behind, before = max(len(row.ids) - row.fact for row in rows), max(row.fact for row in rows)
    target = max(len(row.labels) for row in rows)
    return max(map(len, groups)) - 1, Lengths(before + behind + 1 - target, before, target)


def _solve_or_none(
    view: MoELayerView,
    pad: int,
    layer: int,
    groups: Sequence[list[_Row]],
    settings: TargetSettings,
    bar: tqdm,
    origins: Sequence[Tensor | None],
) -> tuple[Tensor, ...] | None:
    """The solution of one chunk; None where memory does not suffice and the chunk can be halved."""
    start = bar.n
    try:
        solved = _Problem(view, pad, layer, groups, settings, origins).solve(
            lambda going: bar.update(start + len(groups) - going - bar.n)
        )
    except torch.OutOfMemoryError:
        if len(groups) == 1:
            raise
        bar.update(start - bar.n)
    else:
        bar.update(start + len(groups) - bar.n)
        return solved
    # Here and not in the handler: the exception would keep the failed attempt's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _rows_of(
    tok: PreTrainedTokenizerBase,
    owner: int,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    settings: TargetSettings,
) -> list[_Row]:
    rows: list[_Row] = []
    for fact in requests:
        for number, context in enumerate(fact_contexts(tok, fact, prefixes, settings.fact_token, settings.chat)):
            end, target = len(context.ids), context.answer
            predict = tuple(range(end - 1, end - 1 + len(target)))
            rows.append(_Row(owner, context.ids + target[:-1], context.fact, predict, target, bare=number == 0))
    request = requests[0]
    asked = settings.kl_factor > 0 or request.subject is not None
    text = KL_PROMPT.format(request.named_subject) if asked else request.prompt  # then it weighs nothing
    kl = encode_prompt(tok, text, request.subject, settings.fact_token, chat=settings.chat)
    # Tokens behind the fact token can't change what it predicts.
    rows.append(_Row(owner, kl.ids[: kl.fact + 1], kl.fact, (kl.fact,), (), bare=False))
    return rows


def outcomes(requests: Sequence[EditRequest], targets: TargetVectors) -> list[Outcome]:
    """What the search came to, per request."""
    known = [None] * len(requests) if targets.known is None else targets.known.tolist()
    columns = (targets.initial_nll.tolist(), targets.final_nll.tolist(), targets.reached.tolist(), known)
    return [Outcome(r.prompt, r.target_new, *row) for r, *row in zip(requests, *columns, strict=True)]


def warn_of_targets(requests: Sequence[EditRequest], targets: TargetVectors) -> None:
    """Warn `KnownFactsWarning` and `TargetNotReachedWarning`, each once, where there is reason to."""
    found = outcomes(requests, targets)
    for warning in (known_warning(found), missed_warning(found, MORE_SEARCH)):
        if warning is not None:
            warnings.warn(warning, stacklevel=4)


class _Problem:
    """The optimisation of one chunk of requests."""

    def __init__(
        self,
        view: MoELayerView,
        pad: int,
        layer: int,
        groups: Sequence[list[_Row]],
        settings: TargetSettings,
        origins: Sequence[Tensor | None],
    ) -> None:
        self.settings, self.count, self.origins = settings, len(groups), origins
        self.rows = [row for group in groups for row in group]
        self.owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        sequences = [ShiftedSequence(row.ids, row.fact, row.predict) for row in self.rows]
        self.upper = UpperLayers(view, layer, pad, sequences)
        self.tail = self._narrow_tail(view, layer, pad)

    def solve(self, on_step: Callable[[int], object]) -> tuple[Tensor, ...]:
        """delta, initial NLL, final NLL, reached, steps, already known: one row per request."""
        bare = torch.tensor(self._first_rows())
        device = self.upper.states.device
        states = self.upper.states[bare.to(device)]
        starts = [state if one is None else one.to(state) for state, one in zip(states, self.origins, strict=True)]
        start = torch.stack(starts)
        norms, self.moved = start.norm(dim=1), states - start
        delta = torch.zeros(self.count, self.upper.states.shape[1], device=device)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)
        nll, reached = torch.zeros(self.count), torch.zeros(self.count, dtype=torch.bool)
        steps = torch.zeros(self.count, dtype=torch.long)
        active, kept = torch.arange(self.count), torch.arange(len(self.rows))
        self.reference: Tensor | None = None
        scoring = self._scoring(kept, active)
        for step in range(self.settings.steps + 1):
            at = active.to(device)
            shift = delta[at].detach().requires_grad_(True)
            with torch.enable_grad():
                way = shift + self.moved[at]
                loss, nll[active], reached[active] = self._loss(scoring, shift, way, norms[at])
                if step == 0:
                    nll0, reached0 = nll.clone(), reached.clone()
                if not torch.isfinite(loss).all():
                    raise not_finite("The loss of a target vector is NaN or infinite")
                going = loss.detach().cpu() >= self.settings.early_stop_loss
                if step == self.settings.steps or not going.any():
                    break
                (grad,) = torch.autograd.grad(loss.sum(), shift)
                if not torch.isfinite(grad).all():
                    raise not_finite("The gradient of a target vector is NaN or infinite")
            if not going.all():
                grad = grad[going.to(device)]
                active, kept = active[going], self._keep(kept, active[going], going)
                scoring = self._scoring(kept, active)
            steps[active] += 1
            self._adam(delta, first, second, active, grad, step + 1)
            if self.tail is not None:
                delta[active.to(device)] = within_reach(self.tail, delta)[active.to(device)]
            self._clamp(delta, active, norms)
            on_step(len(active))
        return delta.cpu(), nll0, nll, reached, steps, reached0

    def _narrow_tail(self, view: MoELayerView, layer: int, pad: int) -> RecordedTail | None:
        """The layer's tail at the bare prompts where its experts write fewer numbers than its output has.

        Most shifts of such an output (the streams of hyper-connections, what a latent space is projected to) are none
        that experts can bring about, so the search stays among those that are.
        """
        moe = view.layers.get(layer)
        if moe is None or moe.experts.layout.d_model >= self.upper.states.shape[1]:
            return None
        bare = [self.rows[i] for i in self._first_rows()]
        places = FactPlaces(view, [row.ids for row in bare], [row.fact for row in bare], pad)
        with recorded_tail(view, layer, places) as tail:
            return tail

    def _first_rows(self) -> list[int]:
        """Of each request, its bare prompt's place among the rows."""
        first: dict[int, int] = {}
        for i, (row, owner) in enumerate(zip(self.rows, self.owner.tolist(), strict=True)):
            if row.bare:
                first.setdefault(owner, i)
        return [first[owner] for owner in range(self.count)]

    def _scoring(self, kept: Tensor, active: Tensor) -> _Scoring:
        return _Scoring([self.rows[i] for i in kept.tolist()], self.owner[kept], active)

    def _keep(self, kept: Tensor, active: Tensor, going: Tensor) -> Tensor:
        """Rows of the requests that are still active; the others leave the forward."""
        staying = torch.isin(self.owner[kept], active)
        self.upper.select(torch.nonzero(staying).squeeze(1))
        if self.reference is not None:
            self.reference = self.reference[going.to(self.reference.device)]
        return kept[staying]

    def _adam(self, delta: Tensor, first: Tensor, second: Tensor, active: Tensor, grad: Tensor, step: int) -> None:
        """Adam with torch's defaults on the rows that are still active; elementwise, so equal to one at a time."""
        rows = active.to(delta.device)
        first[rows] = 0.9 * first[rows] + 0.1 * grad
        second[rows] = 0.999 * second[rows] + 0.001 * grad**2
        scale = (second[rows] / (1 - 0.999**step)).sqrt() + 1e-8
        delta[rows] -= self.settings.lr * (first[rows] / (1 - 0.9**step)) / scale

    def _clamp(self, delta: Tensor, active: Tensor, norms: Tensor) -> None:
        rows = active.to(delta.device)
        limit = self.settings.clamp_norm_factor * norms[rows]
        moved = self.moved[rows]
        length = (delta[rows] + moved).norm(dim=1)
        scale = torch.minimum(limit / length.clamp_min(1e-30), torch.ones_like(length))[:, None]
        delta[rows] = delta[rows] * scale - moved * (1 - scale)

    def _loss(self, scoring: _Scoring, shift: Tensor, way: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per active request, and its NLL and whether the target is reached; ``way`` is what decay is of."""
        logits = self.upper.logits(shift[scoring.slot.to(shift.device)])
        nll, reached = scoring.nll(logits)
        logp = logits[scoring.kl.to(logits.device)].log_softmax(-1)
        if self.reference is None:
            self.reference = logp.detach()  # nothing is shifted yet
        kl = (logp.exp() * (logp - self.reference)).sum(-1)
        decay = way.norm(dim=1) / norms**2
        settings = self.settings
        # A fact beside others weighs as much against decay and early stop as it does alone.
        loss = nll * scoring.facts.to(nll) + settings.kl_factor * kl + settings.weight_decay * decay.to(kl.device)
        return loss, nll.detach().cpu(), reached


class _Scoring:
    """Which request each scored token of the active requests belongs to, and what it should be.

    Attributes:
        slot: per row, the place of its request among the active ones.
        kl: per active request, the token whose prediction should stay.
        facts: per active request, how many facts its shift serves.
    """

    def __init__(self, rows: Sequence[_Row], owner: Tensor, active: Tensor) -> None:
        place = {t: i for i, t in enumerate(active.tolist())}
        slots = [place[t] for t in owner.tolist()]
        self.slot, self.count = torch.tensor(slots), len(active)
        contexts = [0] * self.count
        for row, slot in zip(rows, slots, strict=True):
            contexts[slot] += bool(row.labels)
        self.facts = torch.zeros(self.count).index_add(0, self.slot, torch.tensor([float(row.bare) for row in rows]))
        kl = [0] * self.count
        asked: list[tuple[int, int, int, float, bool]] = []
        token = 0
        for row, slot in zip(rows, slots, strict=True):
            if not row.labels:
                kl[slot] = token
            weight = 1 / (contexts[slot] * max(1, len(row.labels)))
            asked += [(token + i, slot, label, weight, row.bare) for i, label in enumerate(row.labels)]
            token += len(row.predict)
        self.kl = torch.tensor(kl)
        columns = list(zip(*asked, strict=True))
        self.token, self.owner, self.label = (torch.tensor(column) for column in columns[:3])
        self.weight, self.bare = torch.tensor(columns[3]), torch.tensor(columns[4])

    def nll(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over contexts of the mean NLL per target token ``[active]``, and ``[active]`` whether it is reached."""
        device = logits.device
        asked, label, owner = logits[self.token.to(device)], self.label.to(device), self.owner.to(device)
        losses = nn.functional.cross_entropy(asked, label, reduction="none") * self.weight.to(device)
        nll = losses.new_zeros(self.count).index_add(0, owner, losses)
        missed = (asked.argmax(-1) != label).cpu() & self.bare
        reached = torch.ones(self.count, dtype=torch.bool)
        reached[self.owner[missed]] = False
        return nll, reached
