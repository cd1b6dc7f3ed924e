"""A process that is told to end, or killed, while it saves; gradients that are not finite; memory that runs out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from baselines import settings
from solving_editors import TOK, hparams
from tiny import assert_same_state, facts, flipped_byte, state_of, tiny_model, tiny_tokenizer

from easyedit_moe.checkpoints.saving import save_edited
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import NumericalError
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.targets.search import _Problem

pytestmark = pytest.mark.usefixtures("no_editing_warnings")
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def ended_by(number: signal.Signals, work: Callable[[], object], after: float) -> None:
    """A process of its own works again and again, until the signal ends it ``after`` seconds from its beginning."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(begun, b"x")
            while True:
                work()
        finally:
            os._exit(1)  # an error, which must not go on as a second run of the tests
    os.read(ready, 1)
    time.sleep(after)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    os.close(begun)
    assert os.WIFSIGNALED(status), "the signal, not an error, ended it"
    assert os.WTERMSIG(status) == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_patch_is_the_old_or_the_new_one(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    model, path, patches = tiny_model(), tmp_path / "patch.safetensors", []
    for count in (1, 3):
        patch = make_editor(hparams(data), progress=False).edit(model, TOK, facts(count)).patch
        patch.revert(model)
        patches.append(patch)

    def save() -> None:
        for patch in patches:
            patch.save(path)

    patches[0].save(path)
    for turn in range(8):
        ended_by(number, save, 0.003 * turn)
        assert load_patch(path).id in {patch.id for patch in patches}
    path.write_bytes(flipped_byte(path.read_bytes()))  # what the test would see
    with pytest.raises(ValueError, match="safetensors"):
        load_patch(path)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_checkpoint_is_whole_or_not_there(number: signal.Signals, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    model, tok = load_model(str(source), "float32")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0].mul_(2)
    whole = {path.name for path in save_edited(model, tok, tmp_path / "whole", source).iterdir()}
    for turn in range(6):
        folder = tmp_path / str(turn)

        def save(folder: Path = folder) -> None:
            if not folder.exists():
                save_edited(model, tok, folder, source)

        ended_by(number, save, 0.02 * turn)
        if folder.exists():
            assert {path.name for path in folder.iterdir()} == whole
            for name in whole:
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        else:
            save_edited(model, tok, folder, source)  # what is left beside it is not in the way


def edited(data: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The change of each weight by an edit that keeps its statistics, its bases and its targets in ``folder``."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hp = hparams(data, "MoTE", stats_dir=str(folder), target_cache_dir=str(folder / "targets"))
    make_editor(hp, progress=False).edit(model, TOK, facts(2))
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    squares = sum(float((found[name] - one).double().square().sum()) for name, one in wanted.items())
    return (squares / sum(float(one.double().square().sum()) for one in wanted.values())) ** 0.5


@pytest.mark.parametrize("number", SIGNALS)
def test_statistics_serve_the_next_run(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    wanted = edited(data, tmp_path / "undisturbed")
    for turn in range(4):
        folder = tmp_path / str(turn)
        ended_by(number, lambda folder=folder: edited(data, folder), 0.02 + 0.08 * turn)
        # A target that is found in other company, since it alone was missing, is the same to rounding only.
        assert distance(edited(data, folder), wanted) < 1e-5


def ended_after(number: signal.Signals, work: Callable[[], object], files: int) -> bool:
    """A process of its own works, until the signal ends it once so many files are in place; False if it was done."""
    child = os.fork()
    if child == 0:
        plain, left = os.replace, files

        def replace(*arguments: str | Path) -> None:
            nonlocal left
            plain(*arguments)
            left -= 1
            if not left:
                os.kill(os.getpid(), number)

        os.replace = replace  # ends with this process
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == number
        return True
    assert os.WEXITSTATUS(status) == 0, "no error ended it"
    return False


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_kept_after_each_file_serves_the_next_run(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    """Bit for bit, except where one of the two targets is there and the other is found in other company."""
    wanted, other = edited(data, tmp_path / "undisturbed"), []
    files = 0
    while True:
        folder = tmp_path / str(files)
        if not ended_after(number, lambda folder=folder: edited(data, folder), files + 1):
            break
        files += 1
        targets = len(list(folder.rglob("target-*.safetensors")))
        found = edited(data, folder)
        if targets == 1:
            other.append(distance(found, wanted))
        else:
            assert all(torch.equal(found[name], one) for name, one in wanted.items()), files
    assert files >= 8, "moments and bases of two layers, tokens, two targets, and more"
    assert len(other) == 1
    assert other[0] < 1e-5


def memoe() -> MoEHyperParams:
    values = {"alg_name": "MEMoE", "model_name": "tiny", "layers": [1], "dtype": "float32", "steps": 2}
    return hyperparams_class("MEMoE").from_dict(values | {"locality_weight": 0.0, "expert_width": 4})


class NaNBehind(torch.autograd.Function):
    """The same number, and no gradient that is one."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-LoRA", "AdaLoRA", "UnKE", "MEMoE"])
def test_nan_in_a_gradient_of_training(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are finite, so that only gradients tell; for MEMoE those of the last step, which no loss follows."""
    model, plain, calls = tiny_model(), torch.autograd.grad, []
    hp = memoe() if method == "MEMoE" else settings(method)
    before = state_of(model)

    def poisoned(loss: torch.Tensor, values: list[torch.Tensor], **options: bool) -> tuple[torch.Tensor | None, ...]:
        calls.append(1)
        return plain(NaNBehind.apply(loss), values, **options)

    def backward(loss: torch.Tensor) -> None:
        calls.append(1)
        plain_backward(NaNBehind.apply(loss) if len(calls) == 2 else loss)

    plain_backward = torch.Tensor.backward
    monkeypatch.setattr(torch.autograd, "grad", poisoned)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(NumericalError, match=r"(?i)gradient|not finite|NaN"):
        make_editor(hp, progress=False).edit(model, TOK, facts(2))
    assert calls
    assert_same_state(before, state_of(model))


def test_nan_in_a_gradient_of_the_target_search(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny_model(), _Problem._loss
    before = state_of(model)

    def poisoned(self: _Problem, *arguments: object) -> tuple[torch.Tensor, ...]:
        loss, *rest = plain(self, *arguments)
        return (NaNBehind.apply(loss), *rest)

    monkeypatch.setattr(_Problem, "_loss", poisoned)
    with pytest.raises(NumericalError, match="gradient of a target vector"):
        make_editor(hparams(data), progress=False).edit(model, TOK, facts(2))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", ["Global", "MoE-FT", "MEMoE"])
def test_memory_runs_out_anywhere(method: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the n-th product, for n all over an edit."""
    model, plain = tiny_model(), torch.nn.functional.linear
    hp = hparams(data) if method == "Global" else memoe() if method == "MEMoE" else settings(method)
    editor = make_editor(hp, progress=False)
    before, calls, limit = state_of(model), 0, 10**9

    def scarce(*arguments: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls >= limit:
            raise torch.OutOfMemoryError("planted")
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "linear", scarce)
    for _ in range(2):  # the first prepares
        calls = 0
        editor.edit(model, TOK, facts(2)).patch.revert(model)
    total = calls
    for at in range(1, total, max(1, total // 12)):
        calls, limit = 0, at
        with pytest.raises(torch.OutOfMemoryError):
            editor.edit(model, TOK, facts(2))
        assert_same_state(before, state_of(model))
