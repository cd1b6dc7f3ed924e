"""Target vectors z: what the hidden state at a fact token should be, by gradient descent for many requests at once.

The objective is MEMIT's and AlphaEdit's, per request: mean NLL of all target tokens after the prompt (and after each
context prefix plus prompt), plus ``kl_factor`` times KL(edited || original) of the next token at the fact token of
"{subject} is a", plus weight decay, over a shift ``delta`` added to the last critical layer's output at the fact token.
Layers up to that one are run once. n steps make n updates here; in MEMIT's code n - 1, as its last step only scores.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from easyedit_moe.capture import (
    frozen_parameters,
    hooks,
    inference_mode_of,
    layer_output,
    model_device,
    replace_layer_output,
)
from easyedit_moe.errors import EditingWarning, RequestError, TargetNotReachedWarning, not_finite
from easyedit_moe.layers import MoELayerView
from easyedit_moe.requests import EditRequest
from easyedit_moe.scoring import score_only
from easyedit_moe.tokens import Batch, collate, encode_prompt, encode_target, pad_id

logger = logging.getLogger(__name__)

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class TargetSettings:
    """Hyper-parameters of the optimisation, named as in EasyEdit.

    Attributes:
        steps, lr: Adam steps and learning rate.
        kl_factor: weight of the KL term.
        weight_decay: weight of ``||delta|| / ||h||^2``.
        clamp_norm_factor: bound on ``||delta|| / ||h||``.
        early_stop_loss: a request whose loss falls below leaves the batch.
        batch_size: token sequences in one forward.
        fact_token: see :func:`easyedit_moe.tokens.encode_prompt`.
    """

    steps: int
    lr: float
    kl_factor: float
    weight_decay: float
    clamp_norm_factor: float
    early_stop_loss: float
    batch_size: int
    fact_token: str


@dataclass(frozen=True)
class FactContext:
    """One place where a fact is asked: token ids of (context prefix +) prompt, and the fact token's position."""

    ids: tuple[int, ...]
    fact: int


@dataclass(frozen=True)
class TargetVectors:
    """Shifts of T requests.

    Attributes:
        delta: ``[T, d]`` float32; ``z = h + delta`` at the output of the last critical layer.
        initial_nll, final_nll: ``[T]``, mean over contexts of the mean NLL per target token.
        reached: ``[T]`` bool: after the bare prompt, every target token is now the most likely one.
        steps: ``[T]``, updates made.
    """

    delta: Tensor
    initial_nll: Tensor
    final_nll: Tensor
    reached: Tensor
    steps: Tensor

    def rows(self, start: int, stop: int) -> TargetVectors:
        """The targets of requests ``start`` to ``stop``."""
        return TargetVectors(*(value[start:stop] for value in vars(self).values()))


def fact_contexts(
    tok: PreTrainedTokenizerBase, request: EditRequest, prefixes: Sequence[str], fact_token: str
) -> list[FactContext]:
    """The bare prompt first, then each prefix followed by the prompt."""
    contexts = []
    for prefix in ["", *prefixes]:
        if prefix and request.subject in prefix:
            raise RequestError(
                f"The context prefix {prefix!r} mentions the subject {request.subject!r}; choose another."
            )
        prompt = encode_prompt(tok, prefix + request.prompt, request.subject, fact_token)
        contexts.append(FactContext(prompt.ids, prompt.fact))
    return contexts


def check_lengths(view: MoELayerView, lengths: Sequence[int]) -> None:
    """Raise :class:`RequestError` where prompt plus target exceed the model's context."""
    config = view.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
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
) -> TargetVectors:
    """Optimise the shifts of all requests at the output of ``layer``; see the module's docstring.

    Warns :class:`TargetNotReachedWarning` for requests whose target is not the most likely answer at the end, and
    :class:`EditingWarning` for those whose target already was at the start.

    Raises:
        RequestError: a subject not in its prompt, or a prompt too long. NumericalError: a loss that is not finite.
    """
    groups = [_rows_of(tok, t, request, prefixes, settings.fact_token) for t, request in enumerate(requests)]
    check_lengths(view, [len(row.ids) for rows in groups for row in rows])
    per_request = len(groups[0])
    order = sorted(range(len(groups)), key=lambda t: len(groups[t][0].ids))
    chunk = max(1, settings.batch_size // per_request)
    results: dict[int, tuple] = {}
    starts = range(0, len(order), chunk)
    bar = tqdm(total=len(starts) * settings.steps, desc="targets", unit="step", disable=not progress, leave=False)
    with inference_mode_of(view.model), frozen_parameters(view.model), bar:
        for number, start in enumerate(starts, 1):
            chosen = order[start : start + chunk]
            problem = _Problem(view, pad_id(tok), layer, [groups[t] for t in chosen], settings)
            solved = problem.solve(lambda: bar.update())
            bar.update(number * settings.steps - bar.n)
            results.update({t: tuple(value[i] for value in solved) for i, t in enumerate(chosen)})
    stacked = [torch.stack([results[t][k] for t in range(len(requests))]) for k in range(6)]
    targets = TargetVectors(*stacked[:5])
    _warn(requests, targets, already=stacked[5])
    return targets


def _rows_of(
    tok: PreTrainedTokenizerBase, owner: int, request: EditRequest, prefixes: Sequence[str], fact_token: str
) -> list[_Row]:
    target = encode_target(tok, request.target_new)
    rows = []
    for context in fact_contexts(tok, request, prefixes, fact_token):
        end = len(context.ids)
        predict = tuple(range(end - 1, end - 1 + len(target)))
        rows.append(_Row(owner, context.ids + tuple(target[:-1]), context.fact, predict, tuple(target), bare=not rows))
    kl = encode_prompt(tok, KL_PROMPT.format(request.subject), request.subject, fact_token)
    rows.append(_Row(owner, kl.ids, kl.fact, (kl.fact,), (), bare=False))
    return rows


def _warn(requests: Sequence[EditRequest], targets: TargetVectors, already: Tensor) -> None:
    known = [i for i, flag in enumerate(already.tolist()) if flag]
    if known:
        warnings.warn(
            f"{len(known)} of {len(requests)} targets already are the model's answer, the first for "
            f"{requests[known[0]].prompt!r} -> {requests[known[0]].target_new!r}.",
            EditingWarning,
            stacklevel=3,
        )
    missed = [i for i, flag in enumerate(targets.reached.tolist()) if not flag]
    if missed:
        worst = max(missed, key=lambda i: float(targets.final_nll[i]))
        warnings.warn(
            f"{len(missed)} of {len(requests)} targets were not reached; the worst is {requests[worst].prompt!r} -> "
            f"{requests[worst].target_new!r} at NLL {float(targets.final_nll[worst]):.2f} per token. More "
            "v_num_grad_steps, a larger v_lr or clamp_norm_factor, or earlier layers may help.",
            TargetNotReachedWarning,
            stacklevel=3,
        )


class _Problem:
    """The optimisation of one chunk of requests."""

    def __init__(
        self, view: MoELayerView, pad: int, layer: int, groups: Sequence[list[_Row]], settings: TargetSettings
    ) -> None:
        self.view, self.layer, self.settings = view, layer, settings
        self.count = len(groups)
        self.rows = [row for group in groups for row in group]
        self.owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        self.batch = collate([row.ids for row in self.rows], pad, str(model_device(view.model)))
        self.facts = torch.tensor([row.fact for row in self.rows])
        self.is_kl = torch.tensor([not row.labels for row in self.rows])
        self.is_bare = torch.tensor([row.bare for row in self.rows])
        width = max(len(row.predict) for row in self.rows)
        self.predict = torch.zeros(len(self.rows), width, dtype=torch.long)
        self.labels = torch.full((len(self.rows), width), -100)
        for i, row in enumerate(self.rows):
            self.predict[i, : len(row.predict)] = torch.tensor(row.predict)
            self.labels[i, : len(row.labels)] = torch.tensor(row.labels, dtype=torch.long)

    def solve(self, on_step: Callable[[], object]) -> tuple[Tensor, ...]:
        """delta, initial NLL, final NLL, reached, steps, already known: one row per request."""
        everything = torch.arange(len(self.rows))
        hidden, plain_logits = self._lower_half()
        bare = torch.nonzero(self.is_bare).squeeze(1)
        norms = hidden[bare, self.facts[bare]].float().norm(dim=1)
        delta = torch.zeros(self.count, hidden.shape[-1], device=hidden.device)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)
        reference = plain_logits[self.is_kl, 0].log_softmax(-1)
        nll0, reached0 = self._nll(plain_logits, everything)
        self._use_shortcut = self._shortcut_is_exact(hidden, plain_logits)
        nll, reached = nll0.clone(), reached0.clone()
        steps = torch.zeros(self.count, dtype=torch.long)
        active = torch.arange(self.count)
        for step in range(self.settings.steps + 1):
            rows = torch.nonzero(torch.isin(self.owner, active)).squeeze(1)
            shift = delta[active].detach().requires_grad_(True)
            with torch.enable_grad():
                loss, row_nll, row_reached = self._loss(hidden, rows, active, shift, reference, norms)
                nll[active], reached[active] = row_nll, row_reached
                if not torch.isfinite(loss).all():
                    raise not_finite("The loss of a target vector is NaN or infinite")
                going = loss.detach().cpu() >= self.settings.early_stop_loss
                if step == self.settings.steps or not going.any():
                    break
                (grad,) = torch.autograd.grad(loss.sum(), shift)
            active, grad = active[going], grad[going.to(grad.device)]
            steps[active] += 1
            self._adam(delta, first, second, active, grad, step + 1)
            self._clamp(delta, active, norms)
            on_step()
        return delta.cpu(), nll0, nll, reached, steps, reached0

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
        length = delta[rows].norm(dim=1)
        delta[rows] *= torch.minimum(limit / length.clamp_min(1e-30), torch.ones_like(length))[:, None]

    def _loss(
        self, hidden: Tensor, rows: Tensor, active: Tensor, shift: Tensor, reference: Tensor, norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per active request, and its NLL and whether the target is reached."""
        slot = torch.empty(self.count, dtype=torch.long)
        slot[active] = torch.arange(len(active))
        logits = self._logits(hidden, rows, shift[slot[self.owner[rows]].to(shift.device)])
        nll, reached = self._nll(logits, rows)
        kl_rows = self.is_kl[rows]
        logp = logits[kl_rows.to(logits.device), 0].log_softmax(-1)
        wanted = reference[active.to(reference.device)]
        kl = (logp.exp() * (logp - wanted)).sum(-1)
        kl = kl.new_zeros(len(active)).index_copy(0, slot[self.owner[rows][kl_rows]].to(kl.device), kl)
        decay = shift.norm(dim=1) / norms[active.to(norms.device)] ** 2
        settings = self.settings
        loss = nll.to(kl.device) + settings.kl_factor * kl + settings.weight_decay * decay.to(kl.device)
        return loss, nll.detach().cpu(), reached

    def _nll(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over contexts of the mean NLL per target token ``[active]``, and ``[active]`` whether it is reached."""
        labels = self.labels[rows].to(logits.device)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        real = labels != -100
        per_row = losses.sum(1) / real.sum(1).clamp_min(1)
        owners, inverse = torch.unique(self.owner[rows], return_inverse=True)
        asked = ~self.is_kl[rows]
        where = inverse[asked].to(logits.device)
        total = per_row.new_zeros(len(owners)).index_add(0, where, per_row[asked.to(logits.device)])
        number = torch.bincount(inverse[asked], minlength=len(owners)).to(total.device)
        hit = ((logits.argmax(-1) == labels) | ~real).all(1).cpu()
        nll = total / number
        return (nll if nll.requires_grad else nll.cpu()), hit[self.is_bare[rows]]

    def _lower_half(self) -> tuple[Tensor, Tensor]:
        """Output of ``layer`` for all rows ``[R, S, d]``, and the logits of a plain forward."""
        caught: list[Tensor] = []
        with hooks() as handles:
            module = self.view.decoder_layers[self.layer]
            handles.append(module.register_forward_hook(lambda _, __, out: caught.append(out)))
            logits = self._forward(self.batch, self.predict)
        self._as_tuple = not isinstance(caught[0], Tensor)
        return layer_output(caught[0]), logits

    def _shortcut_is_exact(self, hidden: Tensor, plain_logits: Tensor) -> bool:
        """Whether skipping the layers up to ``layer`` reproduces the plain logits, so that the shortcut may be used."""
        few = torch.arange(min(4, len(self.rows)))
        with self._skip_lower_layers(hidden[few]):
            logits = self._forward(self._select(few), self.predict[few])
        expected = plain_logits[few]
        tolerance = 1e-4 if expected.dtype == torch.float32 and hidden.dtype == torch.float32 else 0.02
        exact = bool((logits - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))
        if not exact:
            logger.info("The layers above %d depend on more than its output; every step runs all layers.", self.layer)
        return exact

    @contextmanager
    def _skip_lower_layers(self, hidden: Tensor) -> Iterator[None]:
        """Inside, layers below ``layer`` pass their input on and ``layer`` answers ``hidden``, without computing."""

        def wrap(value: Tensor) -> Any:
            return (value,) if self._as_tuple else value

        def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return wrap(hidden_states)

        def answering(*args: Any, **kwargs: Any) -> Any:
            return wrap(hidden)

        changed = self.view.decoder_layers[: self.layer + 1]
        saved = [module.__dict__.get("forward") for module in changed]
        try:
            for index, module in enumerate(changed):
                module.forward = answering if index == self.layer else passing
            yield
        finally:
            for module, forward in zip(changed, saved, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _logits(self, hidden: Tensor, rows: Tensor, shift: Tensor) -> Tensor:
        """Logits at the scored positions with each row's shift added at its fact token, ``[rows, M, V]`` float32."""
        facts, place = self.facts[rows].to(hidden.device), torch.arange(len(rows), device=hidden.device)
        if self._use_shortcut:
            base = hidden[rows.to(hidden.device)]
            moved = base.index_put((place, facts), shift.to(base.dtype), accumulate=True)
            with self._skip_lower_layers(moved):
                return self._forward(self._select(rows), self.predict[rows])

        def add(module: nn.Module, args: tuple, output: Any) -> Any:
            out = layer_output(output)
            return replace_layer_output(output, out.index_put((place, facts), shift.to(out.dtype), accumulate=True))

        with hooks() as handles:
            handles.append(self.view.decoder_layers[self.layer].register_forward_hook(add))
            return self._forward(self._select(rows), self.predict[rows])

    def _select(self, rows: Tensor) -> Batch:
        rows = rows.to(self.batch.ids.device)
        return Batch(self.batch.ids[rows], self.batch.mask[rows], self.batch.lengths[rows])

    def _forward(self, batch: Batch, predict: Tensor) -> Tensor:
        with hooks() as handles:
            handles.append(score_only(self.view.model, predict))
            output = self.view.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        return output.logits.float()
