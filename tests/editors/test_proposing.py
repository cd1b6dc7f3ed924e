from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_model

from easyedit_moe.editors import proposing, stages
from easyedit_moe.editors.proposing import Memory, critical_layers, named_proposal, propose
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.hparams.models import OUTLINES
from easyedit_moe.moe.loading import empty_model

PAPERS = [name for name in OUTLINES if name != "factworld"]


@pytest.mark.parametrize("name", PAPERS)
def test_the_rules_give_the_papers_models_their_layers(name: str) -> None:
    layers = OUTLINES[name]["num_hidden_layers"]
    assert critical_layers(layers, range(layers)) == load_hyperparams(f"Global/{name}").layers


@pytest.mark.parametrize(
    ("depth", "moe", "wanted"),
    [
        (1, [0], [0]),
        (2, [0, 1], [0]),
        (4, [3], [3]),
        (12, [8, 10], [8, 10]),
        (32, range(1, 32, 2), [3, 5, 7]),
        (61, range(3, 61), [5, 6, 7, 8, 9]),
        (94, range(94), [10, 11, 12, 13, 14]),
        (48, range(20, 48), [20, 21, 22]),
        (48, [0, 1, 47], [0, 1]),
    ],
)
def test_layers_of_other_depths_and_of_models_with_dense_layers(depth: int, moe: Any, wanted: list[int]) -> None:
    assert critical_layers(depth, list(moe)) == wanted


@pytest.mark.parametrize("name", PAPERS)
def test_the_rules_give_the_papers_models_their_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = OUTLINES[name]
    real, model = proposing.shapes_of, empty_model("factworld", "bfloat16")

    def sized(*arguments: Any) -> Any:
        return replace(real(*arguments), experts=shape["num_experts"], d_model=shape["hidden_size"],
                       d_hidden=shape["moe_intermediate_size"])  # fmt: skip

    monkeypatch.setattr(proposing, "shapes_of", sized)
    made = proposing._Proposing("m", "MoTE", model, None, Memory("cpu"))
    wanted = load_hyperparams(f"MoTE/{name}")
    ranks = {one.name: one.value for one in made._sizes()}
    assert [ranks[n] for n in ("rank_expert", "rank_out", "rank_in")] == [
        wanted.rank_expert, wanted.rank_out, wanted.rank_in
    ]  # fmt: skip


def test_a_small_model_gets_what_the_bundled_one_has_but_its_texts_and_scales() -> None:
    found = propose("m", "Global", loaded=tiny_model("gpt_oss"), memory=Memory("cpu")).hparams()
    shipped = load_hyperparams("Global/factworld")
    names = ("v_lr", "v_num_grad_steps", "clamp_norm_factor", "v_weight_decay", "remember_edits")
    assert all(getattr(found, name) == getattr(shipped, name) for name in names)
    assert (found.nullspace_threshold, found.nullspace_relative, found.context_prefixes) == (None, False, [])


@pytest.mark.parametrize("method", ["Global", "MoTE", "MoEEdit-BCD", "Global+speedup", "MoE-AlphaEdit"])
def test_ridge_and_null_space_of_an_unknown_model_are_in_its_own_units(method: str) -> None:
    proposed = propose("m", method, loaded=tiny_model("mixtral"), memory=Memory("cpu"))
    found = proposed.hparams()
    assert (found.lambda_reg, found.lambda_relative) == (None, proposing.LAMBDA_RELATIVE)
    assert (found.nullspace_threshold, found.nullspace_rank) == (None, proposing.NULLSPACE_RANK)
    assert "lambda_reg:" not in proposed.yaml()
    assert "carry over to no other model" in proposed.yaml()


@pytest.mark.parametrize("method", ["MoE-MEMIT", "MoE-ROME"])
def test_a_covariance_metric_keeps_its_ridge(method: str) -> None:
    """Keys are in units of their covariance then, whatever the model."""
    found = propose("m", method, loaded=tiny_model("mixtral"), memory=Memory("cpu")).hparams()
    assert (found.lambda_reg, found.lambda_relative) == (load_hyperparams(f"{method}/factworld").lambda_reg, None)


def test_models_that_yamls_are_for_keep_their_values() -> None:
    for method in ("Global", "MoTE"):
        found, shipped = propose("factworld", method).hparams(), load_hyperparams(f"{method}/factworld")
        assert (found.lambda_reg, found.lambda_relative) == (shipped.lambda_reg, None)


def test_values_come_from_the_nearest_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposing, "SMALL", 0)
    gpt = propose("m", "MoEEdit-BCD", loaded=tiny_model("gpt_oss"), memory=Memory("cpu")).hparams()
    other = propose("m", "MoEEdit-BCD", loaded=tiny_model("mixtral"), memory=Memory("cpu")).hparams()
    assert (gpt.v_lr, gpt.v_num_grad_steps, gpt.num_passes) == (0.2, 50, 10)
    assert (other.v_lr, other.v_num_grad_steps, other.num_passes) == (0.1, 25, 4)


def test_what_a_device_can_hold_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    monkeypatch.setattr(stages, "BATCH_TOKENS", 64)  # of a model this small, statistics would be the largest stage
    free = propose("m", "Global", loaded=model, memory=Memory("cpu"))
    assert "target_batch_size" not in {one.name for one in free.values}
    assert (free.hparams().device, free.hparams().model_parallel) == ("cpu", False)
    peak, weights = free.memory.peak, free.memory.shapes.parameters
    small = propose("m", "Global", loaded=model, memory=Memory("cuda", int(0.6 * peak + 0.4 * weights)))
    assert small.memory.fits
    assert small.hparams().device == "cuda"
    assert free.hparams().target_batch_size is None
    assert small.hparams().target_batch_size < 256
    assert not small.notes
    spread = propose("m", "Global", loaded=model, memory=Memory("cuda", weights - 1, 1000))
    assert spread.hparams().model_parallel
    tight = propose("m", "Global", loaded=model, memory=Memory("cuda", weights + 1))
    assert "does not fit" in tight.notes[0]
    assert tight.notes[0] in " ".join(line.removeprefix("# ") for line in tight.yaml().splitlines())


def test_dtype_and_context_are_the_models() -> None:
    found = propose("m", "Global", loaded=tiny_model("olmoe", dtype=torch.float16), memory=Memory("cpu")).hparams()
    assert (found.dtype, found.max_length, found.generated_length) == ("float16", 128, 128)


@pytest.mark.parametrize("text", ["x.yaml", "MoTE", "MoTE/", "Nothing/model", "MoTE/some.yaml", "hparams/MoTE/a"])
def test_names_that_are_no_proposal(text: str) -> None:
    assert named_proposal(text) is None


def test_a_name_that_is_one() -> None:
    found = named_proposal("MoEEdit/factworld")
    assert found is not None
    assert (found.method, found.model) == ("MoEEdit-BCD", "factworld")


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("MoE-FT", [3]), ("MoE-FT-L", [3]), ("UnKE", [3]), ("AdaLoRA", list(range(8))), ("MoE-LoRA", [1, 2, 3])],
)
def test_baselines_get_the_layers_that_the_papers_give_them(method: str, wanted: list[int]) -> None:
    made = proposing._Proposing("m", method, empty_model("factworld", "float32"), None, Memory("cpu"))
    made.depth, made.moe_layers = 8, list(range(8))
    assert made._layers().value == wanted
