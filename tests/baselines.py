"""What the tests of the gradient-based methods share: small settings, and checks that all of them must pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, assert_same_state, requests, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import EditResult, make_editor
from easyedit_moe.editors.training import Masters
from easyedit_moe.errors import DenseModelError, EditingWarning, LayerError, NumericalError, RequestError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.patches.tensors import TensorWriter

TOK = tiny_tokenizer()


def settings(method: str, **changes: Any) -> MoEHyperParams:
    """A few steps on the middle layers of a tiny model."""
    values: dict[str, Any] = {"alg_name": method, "model_name": "tiny", "layers": [1, 2], "dtype": "float32"}
    if method == "UnKE":
        values |= {"layers": [2], "v_num_grad_steps": 4, "optim_num_step": 4, "preserve_n_samples": 0}
    else:
        values |= {"num_steps": 3, "train_batch_size": 2}
    return hyperparams_class(method).from_dict(values | changes)


def edit(model: nn.Module, hp: MoEHyperParams, facts: Sequence[Any], **options: Any) -> EditResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        return make_editor(hp, progress=False).edit(model, TOK, parse_requests(facts), **options)


def answer_nll(model: nn.Module, facts: Sequence[dict[str, str]]) -> Tensor:
    """Mean NLL per answer token of each fact, one plain forward per fact; differentiable."""
    out = []
    for fact in facts:
        prompt = TOK(fact["prompt"])["input_ids"]
        answer = TOK(" " + fact["target_new"])["input_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        out.append(-logp[torch.arange(len(answer)), torch.tensor(answer)].mean())
    return torch.stack(out)


def changed_parameters(before: dict[str, Any], model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before["parameters"][n])}


def routed_parameters(model: nn.Module, layers: Sequence[int], part: str = "down_proj") -> set[str]:
    """Names of the routed experts' parameters, by name alone; ``part`` "" means all of them."""
    return {
        n
        for n, _ in model.named_parameters()
        if any(f"layers.{i}." in n for i in layers)
        and ".experts." in n
        and part in n
        and (not part or not n.endswith("_bias"))
    }


def structure(model: nn.Module) -> list[Any]:
    """Names, classes, attributes and order of all modules and parameters."""
    modules = [(name, type(module), list(vars(module))) for name, module in model.named_modules()]
    return [*modules, [(n, id(p)) for n, p in model.named_parameters()], model.config.to_dict()]


def check_one_edit(model: nn.Module, hp: MoEHyperParams, written: set[str], every: bool = True) -> EditResult:
    """Answers become likelier, only ``written`` parameters change, and a revert leaves no trace."""
    facts = requests(3)
    model.get_parameter(next(iter(sorted(written)))).requires_grad_(False)
    before, tree = state_of(model), structure(model)
    with torch.no_grad():
        nll = answer_nll(model, facts).sum()
    result = edit(model, hp, facts)
    changed = changed_parameters(before, model)
    assert changed == written if every else (changed and changed <= written)
    assert changed == set(result.patch.names) == set(result.patch.weights_copy(model))
    assert structure(model) == tree
    after = state_of(model)
    for part in ("requires_grad", "grad", "training", "hooks", "forward"):
        assert before[part] == after[part], part
    with torch.no_grad():
        assert answer_nll(model, facts).sum() < nll
    assert result.seconds["solve"] > 0
    assert result.patch.metadata["hparams"]["alg_name"] == hp.alg_name
    result.patch.revert(model)
    assert_same_state(before, state_of(model))
    assert structure(model) == tree
    return result


def check_scopes(hp: MoEHyperParams) -> None:
    """The same bits whatever the global seed; the user's generator, gradients and modes are not touched."""
    models = [tiny_model(), tiny_model()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.train()
        for module in list(model.modules())[::2]:
            module.training = False
        parameter = model.model.layers[1].mlp.experts.down_proj
        parameter.grad = torch.ones_like(parameter)
        flags, modes = state_of(model)["requires_grad"], state_of(model)["training"]
        generator = torch.get_rng_state()
        edit(model, hp, requests(3))
        assert torch.equal(generator, torch.get_rng_state())
        assert (state_of(model)["requires_grad"], state_of(model)["training"]) == (flags, modes)
        assert parameter.grad.eq(1).all()
        assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert changed_parameters(state_of(models[0]), models[1]) == set()


ERRORS = (KeyboardInterrupt, NumericalError)


def check_interrupted(hp: MoEHyperParams, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised between two steps, or between two writes, the model is bit-equal to before that batch."""
    model = tiny_model()
    edit(model, hp, requests(1))  # so that it holds for later batches, too
    before, tree = state_of(model), structure(model)
    for owner, name, last in ((Masters, "step", 2), (TensorWriter, "write", 1)):
        original, calls = getattr(owner, name), []

        def failing(
            *args: Any, owner: type = owner, original: Any = original, calls: list = calls, last: int = last
        ) -> None:
            calls.append(original(*args))
            if len(calls) == last:
                assert owner is Masters or changed_parameters(before, model)
                raise error("planted")

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, failing)
            with pytest.raises(error, match="planted"):
                edit(model, hp, requests(4)[1:])
        assert len(calls) == last
        assert_same_state(before, state_of(model))
        assert structure(model) == tree


def check_batches(hp: MoEHyperParams, tmp_path: Path) -> None:
    """Sequential batches accumulate, are undone one by one, and travel as files to another copy of the model."""
    model, copy = tiny_model(), tiny_model()
    start = state_of(model)
    first = edit(model, hp, requests(2))
    middle = state_of(model)
    second = edit(model, hp, requests(4)[2:], memory=first.memory)
    end = state_of(model)
    assert changed_parameters(middle, model)
    for i, result in enumerate((first, second)):
        result.patch.save(tmp_path / f"{i}.safetensors")
    loaded = [type(first.patch).load(tmp_path / f"{i}.safetensors") for i in range(2)]
    for patch in loaded:
        patch.apply(copy)
    assert_same_state(end, state_of(copy))
    second.patch.revert(model)
    assert_same_state(middle, state_of(model))
    first.patch.revert(model)
    assert_same_state(start, state_of(model))


def check_stand_alone(hp: MoEHyperParams) -> None:
    """EasyEdit's calls through MoEEditor: kept, undone, and undone by themselves."""
    model = tiny_model()
    before = state_of(model)
    editor = MoEEditor.from_hparams(hp, model, TOK)
    editor.editor.progress = False
    columns = {name: [r[name] for r in requests(3)] for name in ("prompt", "subject", "target_new")}
    arguments = {"prompts": columns["prompt"], "target_new": columns["target_new"], "subject": columns["subject"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        metrics, _, originals = editor.batch_edit(**arguments, sequential_edit=True, verbose=False)
        assert len(metrics) == 3
        assert set(originals) == changed_parameters(before, model)
        while editor.patches:
            editor.undo()
        assert_same_state(before, state_of(model))
        editor.edit(**{name: values[:2] for name, values in arguments.items()}, verbose=False)
    assert_same_state(before, state_of(model))


def check_refusals(method: str, with_targets: Any) -> None:
    """Bad input costs a typed error and changes nothing."""
    cases: list[tuple[type[Exception], str, Callable[[nn.Module], Any]]] = [
        (RequestError, "list of requests is empty", lambda m: edit(m, settings(method), [])),
        (
            RequestError,
            "subject",
            lambda m: edit(m, settings(method), [{"prompt": "x", "subject": "z", "target_new": "y"}]),
        ),
        (LayerError, "out of range", lambda m: edit(m, settings(method, layers=[9]), requests(1))),
        (RequestError, "target vectors", lambda m: edit(m, settings(method), requests(2), targets=with_targets)),
        (
            RequestError,
            "mentions the subject",
            lambda m: edit(m, settings(method, context_prefixes=["Danielle Darrieux! "]), requests(1)),
        ),
        (
            RequestError,
            "the model's context has",
            lambda m: edit(m, settings(method, context_prefixes=["harbour " * 200]), requests(1)),
        ),
    ]
    model = tiny_model()
    before, tree = state_of(model), structure(model)
    for error, message, act in cases:
        with pytest.raises(error, match=message):
            act(model)
        assert_same_state(before, state_of(model))
        assert structure(model) == tree
    with pytest.raises(DenseModelError):
        edit(tiny_model("dense"), settings(method), requests(1))


def corpus(folder: Path) -> str:
    """A file of texts to preserve."""
    path = folder / "corpus.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return str(path)
