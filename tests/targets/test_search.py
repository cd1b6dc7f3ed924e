from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import assert_same_state, requests, shared_model, state_of, tiny_model, tiny_tokenizer, token_ids
from torch import Tensor, nn

from easyedit_moe.errors import EditingWarning, NumericalError, RequestError, TargetNotReachedWarning
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.upper_layers import MODES, ShiftedSequence, UpperLayers
from easyedit_moe.targets.search import (
    TargetSettings,
    TargetVectors,
    _next_chunk,
    _Problem,
    _Row,
    compute_targets,
    fact_contexts,
)

FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_5_moe", "modulelist")
PREFIXES = ["A quiet harbour. ", "The fox: "]
TOK = tiny_tokenizer()
DEFAULTS = {
    "steps": 6, "lr": 0.1, "kl_factor": 0.0625, "weight_decay": 0.1, "clamp_norm_factor": 4.0, "early_stop_loss": 0.05,
    "batch_size": 256, "fact_token": "subject_last",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def targets(
    model: nn.Module, facts: Sequence[Any], layer: int = 1, prefixes: Sequence[str] = (), tok: Any = TOK, **changes: Any
) -> TargetVectors:
    settings = TargetSettings(**(DEFAULTS | changes))
    return compute_targets(
        MoELayerView(model), tok, parse_requests(facts), layer, list(prefixes), settings, progress=False
    )


# ---------------------------------------------------------------- an independent, plain computation


def sharper(model: nn.Module) -> nn.Module:
    """The same with larger logits: losses then differ widely between requests, and targets can be reached."""
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


class Plain:
    """The objective of one request by full forwards, one sequence at a time, and its descent by torch's own Adam."""

    def __init__(self, model: nn.Module, fact: dict[str, str], layer: int, prefixes: Sequence[str] = ()) -> None:
        self.model, self.module = model, model.model.layers[layer]
        self.answer = TOK(" " + fact["target_new"], add_special_tokens=False)["input_ids"]
        self.asked = [self._place(prefix + fact["prompt"], fact["subject"]) for prefix in ["", *prefixes]]
        self.kl = self._place(fact["subject"] + " is a", fact["subject"])
        with torch.no_grad():
            self.reference = self._logits(*self.kl, None)[self.kl[1]].log_softmax(-1)
            ids, at = self.asked[0]
            self.norm = self._state(ids)[at].norm()

    @staticmethod
    def _place(text: str, subject: str) -> tuple[list[int], int]:
        out = TOK(text, return_offsets_mapping=True)
        end = text.index(subject) + len(subject)
        inside = [i for i, (a, b) in enumerate(out["offset_mapping"]) if a < end <= b]
        return out["input_ids"], inside[-1]

    def _state(self, ids: list[int]) -> Tensor:
        seen: list[Tensor] = []
        handle = self.module.register_forward_hook(
            lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
        try:
            self.model(torch.tensor([ids]))
        finally:
            handle.remove()
        return seen[0][0]

    def _logits(self, ids: list[int], at: int, delta: Tensor | None) -> Tensor:
        def add(_: Any, __: Any, out: Any) -> Any:
            hidden = out if isinstance(out, Tensor) else out[0]
            shift = torch.zeros_like(hidden)
            hidden = hidden + torch.cat([shift[:, :at], delta[None, None].to(hidden), shift[:, at + 1 :]], dim=1)
            return hidden if isinstance(out, Tensor) else (hidden, *out[1:])

        handle = self.module.register_forward_hook(add) if delta is not None else None
        try:
            return self.model(torch.tensor([ids])).logits[0].float()
        finally:
            if handle:
                handle.remove()

    def nll(self, delta: Tensor | None) -> Tensor:
        total = []
        for ids, at in self.asked:
            logp = self._logits(ids + self.answer[:-1], at, delta).log_softmax(-1)
            total.append(-torch.stack([logp[len(ids) - 1 + i, token] for i, token in enumerate(self.answer)]).mean())
        return torch.stack(total).mean()

    def divergence(self, delta: Tensor) -> Tensor:
        logp = self._logits(*self.kl, delta)[self.kl[1]].log_softmax(-1)
        return (logp.exp() * (logp - self.reference)).sum()

    def loss(self, delta: Tensor, settings: dict[str, Any]) -> Tensor:
        decay = delta.norm() / self.norm**2
        return self.nll(delta) + settings["kl_factor"] * self.divergence(delta) + settings["weight_decay"] * decay

    def descend(self, **changes: Any) -> tuple[Tensor, int]:
        settings = DEFAULTS | changes
        delta = torch.zeros(self.model.config.hidden_size, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings["lr"])
        for step in range(settings["steps"]):
            loss = self.loss(delta, settings)
            if loss < settings["early_stop_loss"]:
                return delta.detach(), step
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            with torch.no_grad():
                limit = settings["clamp_norm_factor"] * self.norm
                if delta.norm() > limit:
                    delta *= limit / delta.norm()
        return delta.detach(), settings["steps"]


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe"])
def test_same_as_a_plain_computation(family: str) -> None:
    model = tiny_model(family)
    fact = requests(4)[3]
    plain = Plain(model, fact, 1, PREFIXES[:1])
    assert len(plain.answer) > 1
    found = targets(model, [fact], prefixes=PREFIXES[:1])
    with torch.no_grad():
        assert float(found.initial_nll) == pytest.approx(float(plain.nll(None)), abs=1e-4)
        assert float(found.final_nll) == pytest.approx(float(plain.nll(found.delta[0])), abs=1e-4)
    expected, steps = plain.descend()
    assert int(found.steps) == steps == 6
    assert (found.delta[0] - expected).norm() < 2e-3 * expected.norm()
    assert (found.delta.dtype, found.delta.shape) == (torch.float32, (1, 32))


@pytest.mark.parametrize(
    "changes", [{"clamp_norm_factor": 0.2}, {"early_stop_loss": None}, {"kl_factor": 3.0}, {"weight_decay": 2.0}]
)
def test_each_setting_means_what_the_plain_computation_means(changes: dict[str, Any]) -> None:
    model = tiny_model()
    fact = requests(1)[0]
    if "early_stop_loss" in changes:
        changes = {"early_stop_loss": float(targets(model, [fact], steps=5).final_nll) + 0.1}
    expected, steps = Plain(model, fact, 1).descend(steps=10, **changes)
    found = targets(model, [fact], steps=10, **changes)
    assert int(found.steps) == steps
    assert (steps < 10) == ("early_stop_loss" in changes)
    assert (found.delta[0] - expected).norm() < 2e-3 * expected.norm()
    assert (targets(model, [fact], steps=10).delta[0] - expected).norm() > 0.05 * expected.norm()


# ---------------------------------------------------------------- probability rises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_becomes_more_likely(family: str, dtype: torch.dtype) -> None:
    found = targets(tiny_model(family, dtype=dtype), requests(6), steps=15)
    assert (found.final_nll < found.initial_nll - 0.1).all()
    assert found.delta.dtype == torch.float32
    assert (found.steps == 15).all()


def test_reached_targets_stop_early_and_say_so() -> None:
    facts = [
        fact | {"target_new": word}
        for fact, word in zip(requests(6), ("in", "is", "the", "and", "of", "Russia"), strict=True)
    ]
    model = sharper(tiny_model())
    stop = {"early_stop_loss": 1.0, "steps": 60}
    found = targets(model, facts, lr=0.5, clamp_norm_factor=20, weight_decay=0, kl_factor=0, **stop)
    assert found.reached.any()
    assert not found.reached.all()
    assert (found.steps < 60).any()
    assert (found.final_nll[found.steps < 60] < 1).all()
    assert (found.final_nll[found.steps == 60] >= 1).all()
    with torch.no_grad():
        for i, reached in enumerate(found.reached.tolist()):
            plain = Plain(model, facts[i], 1)
            ids, at = plain.asked[0]
            best = plain._logits(ids + plain.answer[:-1], at, found.delta[i]).argmax(-1)[len(ids) - 1 :]
            assert (best.tolist() == plain.answer) == reached


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_any_layer_may_be_the_last_critical_one(layer: int) -> None:
    model, fact = tiny_model(), requests(2)[1]
    if layer == 3:  # behind the last layer only the fact token itself could be moved, and it is not the prompt's last
        assert torch.equal(targets(model, [fact], layer, weight_decay=0, kl_factor=0).delta, torch.zeros(1, 32))
        return
    expected, _ = Plain(model, fact, layer).descend()
    assert (targets(model, [fact], layer).delta[0] - expected).norm() < 2e-3 * expected.norm()


# ---------------------------------------------------------------- batches


def facts_of_many_lengths() -> list[dict[str, str]]:
    facts = requests(6)
    facts[1] |= {"target_new": "Manila and Rome, and the bridge"}
    facts[2] |= {"target_new": "in"}
    facts[4] |= {"prompt": "A quiet harbour, an empty market and a crowded bridge: Angola is in"}
    assert len({len(TOK(f["prompt"])["input_ids"]) for f in facts}) >= 4
    assert len({len(TOK(" " + f["target_new"])["input_ids"]) for f in facts}) >= 3
    return facts


def threshold_that_separates(run: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """A loss that as many requests as possible fall below at steps of their own, from one run without early stop."""
    seen, plain = [], _Problem._loss

    def record(self: _Problem, *args: Any) -> Any:
        out = plain(self, *args)
        seen.append(out[0].detach())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(_Problem, "_loss", record)
        run(early_stop_loss=0.0)
    losses = torch.stack(seen)
    return max(losses.flatten().tolist(), key=lambda at: len(set((losses < at).int().argmax(0).tolist())))


@pytest.mark.parametrize("prefixes", [(), PREFIXES], ids=["bare", "prefixes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_one_at_a_time(family: str, prefixes: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = sharper(tiny_model(family)), facts_of_many_lengths()

    def run(facts: Sequence[Any] = facts, **changes: Any) -> TargetVectors:
        return targets(model, facts, prefixes=prefixes, steps=7, lr=0.2, **changes)

    stop = threshold_that_separates(run, monkeypatch) + 1e-3
    together = run(early_stop_loss=stop)
    assert len(set(together.steps.tolist())) >= 3, "requests should leave at different steps"
    for i, fact in enumerate(facts):
        alone = run([fact], early_stop_loss=stop)
        assert alone.steps[0] == together.steps[i]
        assert alone.reached[0] == together.reached[i]
        for name in ("delta", "initial_nll", "final_nll"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 9])
def test_batch_size_and_order_do_not_matter(batch_size: int) -> None:
    model, facts = tiny_model(), facts_of_many_lengths()
    together = targets(model, facts, prefixes=PREFIXES)
    backwards = targets(model, facts[::-1], prefixes=PREFIXES, batch_size=batch_size)
    torch.testing.assert_close(backwards.delta.flip(0), together.delta, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backwards.final_nll.flip(0), together.final_nll, atol=1e-4, rtol=1e-4)


def test_batch_size_bounds_the_sequences_in_one_forward() -> None:
    model, sizes = tiny_model(), []
    with_hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[0]))
    targets(model, requests(6), prefixes=PREFIXES, batch_size=9, steps=2)
    with_hook.remove()
    assert max(sizes) == 8, "two requests of four sequences each"


def test_padding_side_does_not_matter() -> None:
    facts = facts_of_many_lengths()
    right, left = (targets(tiny_model(), facts, tok=tiny_tokenizer("bos eos", side)) for side in ("right", "left"))
    assert torch.equal(right.delta, left.delta)
    assert not torch.allclose(right.delta, targets(tiny_model(), facts).delta, atol=1e-2)


# ---------------------------------------------------------------- terms of the objective


@pytest.mark.parametrize("family", FAMILIES)
def test_clamp(family: str) -> None:
    model, facts = tiny_model(family), requests(6)
    norms = torch.stack([Plain(model, fact, 1).norm for fact in facts])
    found = targets(model, facts, clamp_norm_factor=0.3)
    lengths = found.delta.norm(dim=1)
    assert (lengths <= 0.3 * norms * (1 + 1e-5)).all()
    assert (lengths > 0.29 * norms).any()
    assert (targets(model, facts, clamp_norm_factor=50.0).delta.norm(dim=1) > 0.3 * norms).any()


def test_kl_factor_keeps_the_essence() -> None:
    model, facts = tiny_model(), requests(4)
    drift = []
    for factor in (0.0, 1.0, 100.0):
        found = targets(model, facts, kl_factor=factor, weight_decay=0.0, steps=15)
        with torch.no_grad():
            drift.append(
                torch.stack([Plain(model, f, 1).divergence(d) for f, d in zip(facts, found.delta, strict=True)])
            )
    assert (drift[1] < drift[0]).all()
    assert (drift[2] < drift[1]).all()


def test_weight_decay_shortens_the_shift() -> None:
    model, facts = tiny_model(), requests(4)
    free, mild, strong = (targets(model, facts, weight_decay=w, steps=15).delta.norm(dim=1) for w in (0.0, 1.0, 20.0))
    assert (mild < free).all()
    assert (strong < 0.2 * free).all()


def test_context_prefixes_count() -> None:
    model, facts = tiny_model(), requests(3)
    bare, more = targets(model, facts, steps=20), targets(model, facts, prefixes=PREFIXES, steps=20)
    assert ((more.delta - bare.delta).norm(dim=1) > 0.05 * bare.delta.norm(dim=1)).all()
    with torch.no_grad():
        for i, fact in enumerate(facts):
            plain = Plain(model, fact, 1, PREFIXES)
            assert float(more.initial_nll[i]) == pytest.approx(float(plain.nll(None)), abs=1e-4)
            assert float(more.final_nll[i]) == pytest.approx(float(plain.nll(more.delta[i])), abs=1e-4)
            assert plain.nll(more.delta[i]) < plain.nll(bare.delta[i])


def test_contexts_of_a_fact() -> None:
    (fact,) = parse_requests(requests(1))
    bare, prefixed = fact_contexts(TOK, fact, PREFIXES[:1], "subject_last")
    assert TOK.decode(bare.ids) == fact.prompt
    assert TOK.decode(prefixed.ids) == PREFIXES[0] + fact.prompt
    assert TOK.decode(bare.ids[: bare.fact + 1]).endswith(fact.subject)
    assert TOK.decode(prefixed.ids[: prefixed.fact + 1]) == PREFIXES[0] + fact.subject


def test_fact_token_is_where_the_shift_goes() -> None:
    model, fact = tiny_model(), requests(2)[1]
    found = targets(model, [fact], fact_token="last")
    plain = Plain(model, fact, 1)
    ids, _ = plain.asked[0]
    plain.asked, plain.kl = [(ids, len(ids) - 1)], (plain.kl[0], len(plain.kl[0]) - 1)
    with torch.no_grad():
        plain.reference = plain._logits(*plain.kl, None)[-1].log_softmax(-1)
        plain.norm = plain._state(ids)[-1].norm()
    expected, _ = plain.descend()
    assert (found.delta[0] - expected).norm() < 2e-3 * expected.norm()


# ---------------------------------------------------------------- the shortcut past the lower layers


def count_forwards(model: nn.Module, layer: int) -> tuple[list[int], Any]:
    """Real computations of a layer: those in which its attention or its norm runs."""
    calls: list[int] = []
    module = next(m for n, m in model.model.layers[layer].named_modules() if n.endswith("layernorm"))
    return calls, module.register_forward_hook(lambda *_: calls.append(1))


def force(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(UpperLayers, "_candidates", lambda *_: (mode,))


def mode_taken(model: nn.Module, layer: int = 1) -> str:
    sequences = [ShiftedSequence(tuple(token_ids(n, n)), n - 4, (n - 2, n - 1)) for n in (4, 6, 9)]
    with torch.no_grad():
        return UpperLayers(MoELayerView(model), layer, 0, sequences).mode


RECURRENT = ("qwen3_5_moe",)


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe", "deepseek_v3", "mixtral"])
def test_every_way_to_run_a_step_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_oss here has a window of 16 tokens, which the contexts exceed."""
    model, facts = tiny_model(family), facts_of_many_lengths()
    prefixes = [PREFIXES[0] * 4, PREFIXES[1]]
    calls, handle = count_forwards(model, 0)
    quick = targets(model, facts, prefixes=prefixes)
    assert len(calls) == 2, "the layers below run once, and once more on a few sequences to check the shortcut"
    assert mode_taken(model) == ("layers" if family in RECURRENT else "suffix")
    for mode, forwards in (("layers", 2), ("model", 2 + 7)):
        force(monkeypatch, mode)
        calls.clear()
        plain = targets(model, facts, prefixes=prefixes)
        assert len(calls) == forwards
        torch.testing.assert_close(quick.delta, plain.delta, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(quick.final_nll, plain.final_nll, atol=1e-4, rtol=1e-4)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_half_precision_takes_the_fast_way_too(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    assert mode_taken(model) == "suffix"
    half, single = targets(model, requests(4)), targets(tiny_model(family), requests(4))
    torch.testing.assert_close(half.initial_nll, single.initial_nll, atol=0.05, rtol=0.05)


def test_recurrent_layers_below_do_not_matter() -> None:
    """The fourth layer of this model is softmax attention."""
    assert mode_taken(tiny_model("qwen3_5_moe"), layer=2) == "suffix"


def test_a_fact_token_at_the_very_start() -> None:
    model = tiny_model()
    fact = {"prompt": "Ana is in", "subject": "Ana", "target_new": "Rome"}
    facts = [fact | {"subject": "A", "prompt": "A is in"}, *requests(3)]
    assert TOK("A is in")["input_ids"][0] == TOK("A")["input_ids"][0]
    together = targets(model, facts)
    for i, one in enumerate(facts):
        torch.testing.assert_close(together.delta[i], targets(model, [one]).delta[0], atol=1e-4, rtol=1e-4)
    expected, _ = Plain(model, facts[0], 1).descend()
    assert (together.delta[0] - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_experts_compute_only_what_is_read(how: str) -> None:
    model, seen = tiny_model(implementation=how), []
    sequences = [ShiftedSequence(tuple(token_ids(n, n)), 2, (n - 1,)) for n in (4, 6, 9)]
    with torch.no_grad():
        upper = UpperLayers(MoELayerView(model), 1, 0, sequences)
        for index in (2, 3):
            experts = model.model.layers[index].mlp.experts
            plain = type(experts).forward
            experts.forward = lambda *a, _plain=plain, _self=experts: seen.append(len(a[0])) or _plain(_self, *a)
        logits = upper.logits(torch.randn(3, 32))
    assert seen == [2 + 4 + 7, 3], "tokens behind the fact token, then scored tokens"
    assert logits.shape == (3, 400)


def test_sequences_that_leave_do_not_change_the_others() -> None:
    for family in FAMILIES:
        sequences = [ShiftedSequence(tuple(token_ids(n, n)), n - 3, (n - 2, n - 1)) for n in (4, 9, 6, 12)]
        upper, shift = UpperLayers(MoELayerView(shared_model(family)), 1, 0, sequences), torch.randn(4, 32)
        with torch.no_grad():
            everything = upper.logits(shift)
            upper.select(torch.tensor([1, 3]))
            upper.select(torch.tensor([0, 1]))
            some = upper.logits(shift[[1, 3]])
        torch.testing.assert_close(some, everything[[2, 3, 6, 7]], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("most", "taken"), [(1, 1), (2, 1), (3, 3)])
def test_halved_where_memory_runs_out(most: int, taken: int, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    model, facts, solve, sizes = tiny_model(), facts_of_many_lengths(), _Problem.solve, []
    plain = targets(model, facts)

    def limited(self: _Problem, on_step: Any) -> Any:
        sizes.append(self.count)
        if self.count > most:
            on_step(0)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return solve(self, on_step)

    monkeypatch.setattr(_Problem, "solve", limited)
    before = state_of(model)
    found = targets(model, facts)
    assert_same_state(before, state_of(model))
    assert sizes[0] == 6
    assert [size for size in sizes if size <= most] == [taken] * (6 // taken)
    assert sizes.count(6) == 1, "a size that failed is not tried again"
    assert "Memory ran out; going on with at most" in caplog.text
    torch.testing.assert_close(found.delta, plain.delta, atol=1e-4, rtol=1e-4)


def test_one_request_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = odd_state(tiny_model())
    before = state_of(model)
    monkeypatch.setattr(_Problem, "_loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        targets(model, requests(3))
    assert_same_state(before, state_of(model))


def test_requests_of_one_length_share_a_forward() -> None:
    """40 requests of 3 tokens behind the fact token and 15 of 12: not all padded to 12 though the limit allows it."""
    rows = [[_Row(t, tuple(range(2, 2 + n)), 0, (n - 1,), (5,), True)] for t, n in enumerate([3] * 40 + [12] * 15)]
    assert _next_chunk(rows, 64) == 40
    assert _next_chunk(rows[40:], 64) == 15
    assert _next_chunk(rows, 10) == 10
    assert _next_chunk(rows, 400) == 55, "small chunks are not split"
    assert _next_chunk([rows[0] * 9, rows[1]], 4) == 1, "a request that exceeds the limit runs alone"


class Skip(nn.Module):
    """Two layers that talk past the ones between: the later adds what the earlier put out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        kept: list[Tensor] = []
        model.model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
        model.model.layers[3].register_forward_hook(lambda _, __, out: out + 0.5 * kept.pop())


def test_shortcut_is_not_used_where_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    model, facts = tiny_model(), requests(3)
    Skip(model)
    caplog.set_level(logging.INFO, "easyedit_moe")
    found = targets(model, facts)
    assert "every step runs all layers" in caplog.text
    assert mode_taken(model) == "model"
    with torch.no_grad():
        for i, fact in enumerate(facts):
            plain = Plain(model, fact, 1)
            assert float(found.final_nll[i]) == pytest.approx(float(plain.nll(found.delta[i])), abs=1e-4)
    force(monkeypatch, "layers")
    assert not torch.allclose(targets(model, facts).delta, found.delta, atol=1e-3)


# ---------------------------------------------------------------- warnings and errors


def test_warning_about_targets_that_were_not_reached() -> None:
    with pytest.warns(TargetNotReachedWarning, match=r"3 of 3 targets were not reached; the worst is '.*' at NLL \d"):
        found = targets(tiny_model(), requests(3), steps=1, lr=0.01)
    assert not found.reached.any()


def test_warning_about_targets_that_are_the_models_answer() -> None:
    model, (fact, other) = tiny_model(), requests(2)
    answer = TOK(" e", add_special_tokens=False)["input_ids"]
    assert len(answer) <= 2
    plain = Plain(model, fact | {"target_new": "e"}, 1)
    ids, _ = plain.asked[0]
    with torch.no_grad():
        states: list[Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
        model(torch.tensor([ids + answer[:-1]]))
        handle.remove()
        for i, token in enumerate(answer):
            state = states[0][len(ids) - 1 + i]
            model.lm_head.weight[token] = 30 * state / (state @ state)
    with pytest.warns(EditingWarning, match=r"1 of 2 targets already are the model's answer, the first for 'Danielle"):
        found = targets(model, [fact | {"target_new": "e"}, other])
    assert found.reached[0]
    assert (found.steps[0], found.delta[0].norm()) == (0, 0)
    assert found.steps[1] == 6


def test_whoever_warns_by_himself_is_not_warned() -> None:
    view, settings = MoELayerView(tiny_model()), TargetSettings(1, 0.01, 0.0, 0.0, 1.0, 0.0, 8, "last")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_targets(view, TOK, parse_requests(requests(2)), 1, (), settings, False, warn=False)
    assert not found.reached.any()
    assert not found.known.any()
    assert found.rows(1, 2).known.shape == (1,)
    assert replace(found, known=None).rows(1, 2).known is None


def test_a_prefix_may_not_mention_the_subject() -> None:
    with pytest.raises(RequestError, match=r"context prefix 'Lyon is far\. ' mentions the subject 'Lyon'"):
        targets(tiny_model(), requests(2), prefixes=["Lyon is far. "])


def test_prompt_longer_than_the_context() -> None:
    model = tiny_model()
    fact = requests(1)[0]
    long = fact | {"prompt": "The fox. " * 40 + fact["prompt"]}
    before = state_of(model)
    with pytest.raises(RequestError, match=r"has \d+ tokens; the model's context has 128"):
        targets(model, [*requests(3)[1:], long])
    with pytest.raises(RequestError, match="the model's context has 128"):
        targets(model, requests(2), prefixes=["The fox. " * 40])
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "where", ["model.layers.0.mlp.experts.down_proj", "model.layers.3.self_attn.q_proj.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite(where: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(where).fill_(float("inf"))
    before = state_of(model)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        targets(model, requests(3))
    assert_same_state(before, state_of(model))


# ---------------------------------------------------------------- the model is left as it was


def odd_state(model: nn.Module) -> nn.Module:
    """Flags that a user may have set: training mode here, a frozen parameter there, a forward of their own."""
    model.train()
    model.model.layers[2].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].forward = model.model.layers[0].forward
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_model_state_is_unchanged(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_state(tiny_model(family))
    before = state_of(model)
    force(monkeypatch, mode)
    found = targets(model, requests(3), prefixes=PREFIXES)
    assert_same_state(before, state_of(model))
    assert torch.is_grad_enabled()
    assert not found.delta.requires_grad
    evaluating = targets(tiny_model(family), requests(3), prefixes=PREFIXES)
    assert torch.equal(found.delta, evaluating.delta)


def test_no_gradient_is_kept_for_parameters() -> None:
    model, asked = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: asked.append(any(p.requires_grad for p in model.parameters())))
    targets(model, requests(2))
    assert asked
    assert not any(asked)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "where"), [(_Problem, "_adam"), (_Problem, "_loss"), (UpperLayers, "_forward"), (UpperLayers, "_run")]
)
def test_model_state_is_unchanged_after_an_error(
    owner: type, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = odd_state(tiny_model())
    before, plain, calls = state_of(model), getattr(owner, where), []

    def third_fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(owner, where, third_fails)
    with pytest.raises(error):
        targets(model, requests(3))
    assert_same_state(before, state_of(model))
    assert torch.is_grad_enabled()


def test_edit_requests_themselves_are_accepted() -> None:
    parsed = [EditRequest(r["prompt"], r["subject"], r["target_new"]) for r in requests(2)]
    assert torch.equal(targets(tiny_model(), parsed).delta, targets(tiny_model(), requests(2)).delta)
