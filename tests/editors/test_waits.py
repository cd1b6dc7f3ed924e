"""How often a whole edit makes the CPU wait for the device: per layer and batch, not per expert and not per request."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from baselines import settings
from solving_editors import TOK, VARIANTS, hparams
from tiny import CONFIGS, TEXTS, randomise
from torch import nn

from benchmarks.syncs import counted_syncs
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams
from easyedit_moe.hparams.memoe import MEMoEHyperParams
from easyedit_moe.targets.search import TargetVectors

PER_LAYER = 55
"""Waits of one layer and batch that no solver exceeds; of what a batch does once, `PER_BATCH`."""
PER_BATCH = 30
SOLVERS = [name for name in VARIANTS if name != "MoE-ROME"]
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {}, "relative": {"lambda_reg": None, "lambda_relative": 0.1}, "norm": {"norm_anchor": 1.01},
    "bound": {"preservation_bound": 1e-6}, "rate": {"sequence_rate": 1.0}, "sphere": {"sphere_energy": 0.5},
    "cumulative": {"cumulative_ridge": True, "remember_edits": True}, "anchor": {"anchor_targets": True},
    "replay": {"replay_facts": 2}, "join": {"join_facts": True}, "remember": {"remember_edits": True},
    "refresh": {"refresh_every": 1}, "refresh covariance": {"refresh_every": 1, "metric": "covariance"},
    "refresh energy": {
        "refresh_every": 1, "nullspace_threshold": None, "nullspace_relative": False, "nullspace_energy": 0.9,
    },
}  # fmt: skip
FULL = 110
"""Facts at which each of 8 experts has more than 32 tokens, and more than it has unknowns."""


def model_of(experts: int) -> nn.Module:
    """Its own forward waits for nothing that depends on the experts."""
    config = CONFIGS["qwen3_moe"]()
    config.num_experts = experts
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def facts(start: int, stop: int) -> list[Any]:
    names = [f"Ana {chr(65 + number % 26)}{chr(97 + number // 26)}ro" for number in range(start, stop)]
    return parse_requests([{"prompt": f"{n} lives in", "subject": n, "target_new": "Rome"} for n in names])


def shifts(count: int, width: int) -> TargetVectors:
    delta = 0.1 * torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return TargetVectors(delta, *torch.ones(2, count), torch.ones(count, dtype=torch.bool), torch.ones(count).long())


def waits(hp: MoEHyperParams, experts: int, count: int, given: bool) -> int:
    """Of the second batch of an editor; ``given``: target vectors are none that were searched."""
    model, editor = model_of(experts), make_editor(hp, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        editor.prepare(model, TOK)
        targets = shifts(count, model.config.hidden_size) if given else None
        first = editor.edit(model, TOK, facts(0, count), targets=targets)
        with counted_syncs("cpu") as found:
            editor.edit(model, TOK, facts(count, 2 * count), first.memory, targets)
    return found.total()


def small(data: Path, variant: str, **changes: Any) -> MoEHyperParams:
    """All facts in one forward, and ranks that fit a tiny model."""
    ranks = {"rank_expert": 4, "rank_out": 16, "rank_in": 12} if variant.startswith("MoTE") else {}
    return hparams(data, variant, capture_batch_size=1000, **changes, **ranks)


@pytest.mark.parametrize("remember", [False, True], ids=["", "remembering"])
@pytest.mark.parametrize("variant", SOLVERS)
def test_solvers_wait_per_layer_and_batch(variant: str, remember: bool, data: Path, tmp_path: Path) -> None:
    """With three times the experts or the facts they wait as often; a layer more costs at most so many waits more."""

    def counted(experts: int = 8, count: int = 3, layers: tuple[int, ...] = (1, 2)) -> int:
        changes: dict[str, Any] = {"stats_dir": str(tmp_path / str(experts)), "layers": list(layers)}
        if variant != "MoE-AlphaEdit":  # which always does
            changes["remember_edits"] = remember
        return waits(small(data, variant, **changes), experts, count, given=True)

    usual, wider, more, deeper = counted(), counted(experts=24), counted(count=9), counted(layers=(0, 1, 2))
    assert wider <= usual + 4
    # An expert with more facts than unknowns is solved by another form.
    assert more <= usual + 12
    assert deeper <= usual + PER_LAYER
    assert usual <= 2 * PER_LAYER + PER_BATCH


@pytest.mark.parametrize(
    ("variant", "option"),
    [("MoEEdit-BCD", name) for name in OPTIONS]
    + [(v, n) for v in ("Global", "MoTE") for n in ("none", "relative", "norm", "cumulative", "remember")],
)
def test_full_experts_and_options_for_long_runs_wait_as_often(
    variant: str, option: str, data: Path, tmp_path: Path
) -> None:
    given = option not in ("anchor", "replay", "join")

    def counted(experts: int, count: int) -> int:
        changes = {"stats_dir": str(tmp_path / str(experts)), "v_num_grad_steps": 1, **OPTIONS[option]}
        return waits(small(data, variant, **changes), experts, count, given)

    usual, wider, full = counted(8, 12), counted(24, 12), counted(8, FULL)
    # Earlier facts of which there are more than unknowns are remembered by another form.
    more = 12 if OPTIONS[option].get("remember_edits") else 4
    assert max(wider, full) <= usual + more


@pytest.mark.parametrize("variant", ["Global", "MoEEdit-BCD"])
def test_sequential_calls_and_their_undoing_wait_as_often(variant: str, data: Path, tmp_path: Path) -> None:
    """A search of targets waits in each step, of which there is one."""

    def counted(experts: int, count: int) -> tuple[int, int]:
        changes = {"stats_dir": str(tmp_path / str(experts)), "batch_size": count, "v_num_grad_steps": 1}
        editor = MoEEditor(small(data, variant, **changes), model_of(experts), TOK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditingWarning)
            for number in range(3):
                asked = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new}
                         for f in facts(number * count, (number + 1) * count)]  # fmt: skip
                with counted_syncs("cpu") as call:
                    editor.batch_edit(requests=asked, sequential_edit=True, verbose=False)
        with counted_syncs("cpu") as undoing:
            editor.undo(2)
        return call.total(), undoing.total()

    (usual, undone), (wider, wider_undone), (full, full_undone) = counted(8, 12), counted(24, 12), counted(8, FULL)
    assert wider <= usual + 4
    assert full <= usual + 4
    assert max(wider_undone, full_undone) <= undone + 2


def test_rome_waits_per_request_and_not_per_expert(data: Path, tmp_path: Path) -> None:
    """Each of its edits is a solve of its own, with its own search."""

    def counted(experts: int, count: int) -> int:
        changes = {"stats_dir": str(tmp_path / str(experts)), "v_num_grad_steps": 2}
        return waits(hparams(data, "MoE-ROME", **changes), experts, count, given=False)

    one, wider, three = counted(8, 1), counted(24, 1), counted(8, 3)
    assert wider <= one + 4
    assert three <= 3 * one


@pytest.mark.parametrize("method", ["MoE-FT", "MoE-FT-L", "UnKE", "MoE-LoRA", "MEMoE"])
def test_training_waits_per_step_and_not_per_expert_or_request(method: str, tmp_path: Path) -> None:
    if method == "MoE-LoRA":
        pytest.importorskip("peft")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")

    def counted(experts: int = 8, count: int = 2, steps: int = 3) -> int:
        if method == "MEMoE":
            values = {"alg_name": "MEMoE", "model_name": "tiny", "layers": [1], "dtype": "float32", "steps": steps}
            more = {"locality_dataset": str(tmp_path / "corpus.txt"), "expert_width": 8, "locality_batch_size": 2}
            return waits(MEMoEHyperParams.from_dict(values | more), experts, count, given=False)
        name = "optim_num_step" if method == "UnKE" else "num_steps"
        size = {} if method == "UnKE" else {"train_batch_size": 8}
        return waits(settings(method, **{name: steps}, **size), experts, count, given=False)

    usual, wider, more, longer = counted(), counted(experts=24), counted(count=4), counted(steps=6)
    assert wider <= usual + 4
    # Where prompts differ in length, transformers looks at the mask once more in each forward.
    assert more <= usual + 8
    assert longer - usual <= 3 * PER_LAYER
