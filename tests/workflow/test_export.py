"""Exports from Python and the command line: scores, what is refused, and that nothing is then written."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

import pytest
from baselines import edit as train
from baselines import settings
from edited_folders import edited, files_of, model_of, saved
from planted_patches import write
from quantised import to_fp8, to_mxfp4
from solving_editors import TOK
from tiny import facts, requests, tiny_model
from torch import nn
from typer.testing import CliRunner

from easyedit_moe.checkpoints.apply import apply_patch
from easyedit_moe.commands.app import app
from easyedit_moe.errors import (
    AdapterError,
    AlreadyAppliedError,
    CheckpointError,
    DataError,
    EditingError,
    PatchError,
)
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.patches.files import load_patch
from easyedit_moe.serving.factors import layer_factors
from easyedit_moe.workflow.export import export
from easyedit_moe.workflow.export_report import Exported


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", model_of("qwen3_moe"))


@pytest.fixture
def patch(source: Path) -> Path:
    """A patch of the checkpoint, with the facts it says it edits."""
    model = load_model(str(source), "bfloat16")[0]
    made = edited(model, scale=2.0)
    made.metadata |= {"requests": [vars(fact) for fact in facts(3)], "hparams": {"alg_name": "Global"}}
    made.save(source.parent / "patch.safetensors")
    return source.parent / "patch.safetensors"


def exported(patch: Any, to: str = "peft", **options: Any) -> Exported:
    return export(patch, to, progress=False, **options)


def three_scores(source: Path, patch: Path, rank: int) -> list[list[float]]:
    """Probabilities of the facts' targets: as the model is, with the patch, and with dense truncated updates."""

    def scores(model: nn.Module) -> list[float]:
        pairs = [(fact["prompt"], fact["target_new"]) for fact in requests(3)]
        return [exp(-one.nll * len(one.labels)) for one in score_targets(model, TOK, pairs)]

    model, read = load_model(str(source), "bfloat16")[0], load_patch(patch)
    found = [scores(model)]
    read.apply(model)
    found.append(scores(model))
    read.revert(model)
    view = MoELayerView(model)
    for factors in layer_factors(read, rank):
        for expert, (b, a) in factors.experts.items():
            weight = view.layers[factors.layer].experts.read(expert)
            weight.copy_((weight.float() + b.float() @ a.float()).to(weight.dtype))
    return [*found, scores(model)]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_scores_are_those_of_each_model(rank: int, source: Path, patch: Path) -> None:
    found = exported(patch, rank=rank, model=str(source))
    expected = three_scores(source, patch, rank)
    assert [fact.prompt for fact in found.facts] == [fact["prompt"] for fact in requests(3)]
    for column in range(3):
        got = [fact.probability[column] for fact in found.facts]
        assert got == pytest.approx(expected[column], rel=0.02)
    assert any(abs(fact.probability[1] / fact.probability[0] - 1) > 0.05 for fact in found.facts)
    assert (rank == 3) != any(abs(fact.probability[2] / fact.probability[1] - 1) > 0.05 for fact in found.facts)
    assert exported(patch, rank=rank, model=str(source), score=False, out=source.parent / "b").facts == ()
    assert exported(patch, model=str(source), score=True, out=source.parent / "c").facts


def test_without_a_model_peft_needs_none(patch: Path) -> None:
    found = exported(patch)
    assert found.folder == patch.parent / "adapter-peft"
    assert {path.name for path in found.folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert found.slot_bytes is None
    assert json.loads(json.dumps(found.to_dict()))["layers"][0] == asdict(found.layers[0])


def test_a_patch_on_a_patch_says_what_its_base_is(source: Path, tmp_path: Path) -> None:
    model = load_model(str(source), "bfloat16")[0]
    first = edited(model)
    second = edited(model, seed=1, parent=first.id)
    assert first.id in " ".join(exported(second, out=tmp_path / "a").remarks)
    with pytest.raises(PatchError, match=f"patch {first.id}: apply that one first"):
        exported(second, out=tmp_path / "b", model=str(source))
    base = apply_patch(first, source, tmp_path / "with first")
    assert exported(second, out=tmp_path / "b", model=str(base)).remarks == ()


def test_another_dtype_is_said(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    model = load_model(str(source), "float32")[0]
    found = exported(edited(model), out=tmp_path / "a", model=str(source))
    assert "another dtype" in found.remarks[0]
    assert found.dtype == "float32"


def _tensor_patch(folder: Path) -> Path:
    patch = train(tiny_model(), settings("MoE-FT", num_steps=1, lr=1e-2), requests(1)).patch
    patch.save(folder / "tensors.safetensors")
    return folder / "tensors.safetensors"


REFUSED: dict[str, tuple[dict[str, Any], type[EditingError], str]] = {
    "target": ({"to": "tgi"}, PatchError, "to must be one of peft, vllm, sglang"),
    "near target": ({"to": "vlm"}, PatchError, "Did you mean 'vllm'"),
    "form": ({"form": "dense"}, PatchError, "form must be one of"),
    "form of a server": ({"to": "vllm", "form": "packed"}, PatchError, "--form is for peft only"),
    "dtype": ({"dtype": "int8"}, PatchError, "dtype must be one of"),
    "rank": ({"rank": 0}, PatchError, "at least 1"),
    "version": ({"peft_version": "0.19.0"}, PatchError, "0.19.0"),
    "no model for names": ({"to": "sglang"}, DataError, "Give --model"),
    "no model for scores": ({"score": True}, DataError, "Give --model"),
    "no such model": ({"model": "/nowhere/at/all"}, DataError, "no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_writes_nothing(case: str, patch: Path) -> None:
    options, kind, message = REFUSED[case]
    before = files_of(patch.parent)
    with pytest.raises(kind, match=message):
        exported(patch, **options)
    assert files_of(patch.parent) == before


def test_models_and_folders_that_are_refused(source: Path, patch: Path, tmp_path: Path) -> None:
    before = files_of(source)
    other = saved(tmp_path / "other", model_of("mixtral"))
    with pytest.raises(PatchError):
        exported(patch, model=str(other))
    held = apply_patch(load_patch(patch), source, tmp_path / "held")
    with pytest.raises(AlreadyAppliedError):
        exported(patch, "vllm", model=str(held))
    with pytest.raises(CheckpointError, match="not an empty folder"):
        exported(patch, out=source, model=str(source))
    assert files_of(source) == before
    assert not (tmp_path / "adapter-peft").exists()


def test_what_is_no_low_rank_update(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="whole tensors"):
        exported(_tensor_patch(tmp_path))
    with pytest.raises(PatchError, match="does not exist"):
        exported(tmp_path / "nothing.safetensors")
    with pytest.raises(PatchError, match="out must name a folder"):
        exported(write(tiny_model()))
    model = model_of("old_style")
    with pytest.raises(PatchError, match="are modules"):
        exported(edited(model), form="packed", out=tmp_path / "a")
    from easyedit_moe.adapters.moe_adapter import MoEAdapter

    with pytest.raises(AdapterError, match="no LoRA can do"):
        exported(MoEAdapter.__new__(MoEAdapter), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_rank_that_vllm_does_not_serve(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyedit_moe.serving import servers

    small = servers.Server("vLLM", "0.33.0", ranks=(1, 2))
    monkeypatch.setitem(servers.SERVERS, "vllm", small)
    model = load_model(str(source), "bfloat16")[0]
    made = edited(model)
    with pytest.raises(PatchError, match=r"this one has rank 3\. Give --rank 2 or less, or write a merged"):
        exported(made, "vllm", out=tmp_path / "a", model=str(source))
    assert exported(made, "vllm", out=tmp_path / "a", model=str(source), rank=2, score=False).rank == 2


def test_the_command(source: Path, patch: Path) -> None:
    arguments = ["export", str(patch), "--to", "vllm", "--model", str(source), "--rank", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "vLLM 0.33.0" in result.output
    assert "probability of the new target" in result.output
    again = CliRunner().invoke(app, [*arguments, "--out", str(patch.parent / "json"), "--json", "--no-score"])
    found = json.loads(again.stdout)
    assert (found["rank"], found["form"], found["facts"]) == (2, "per-expert", [])
    twice = CliRunner().invoke(app, arguments)
    assert twice.exit_code == 2
    assert "not an empty folder" in twice.output


@pytest.mark.parametrize(("to", "count"), [("peft", 1), ("vllm", 1), ("sglang", 2)])
def test_a_base_that_stays_in_mxfp4(to: str, count: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("gpt_oss"))
    to_mxfp4(source)
    model = load_model(str(source), "bfloat16")[0]
    found = exported(edited(model), to, out=tmp_path / "a", model=str(source))
    assert len(found.remarks) == count
    assert "stored as mxfp4" in found.remarks[0]
    assert ("serve a base in bfloat16" in found.remarks[-1]) == (to == "sglang")
    assert found.remarks[0] in (tmp_path / "a" / "README.md").read_text()
    held = apply_patch(edited(load_model(str(source), "bfloat16")[0]), source, tmp_path / "held")
    with pytest.raises(AlreadyAppliedError):
        exported(edited(load_model(str(source), "bfloat16")[0]), to, out=tmp_path / "b", model=str(held))


def test_a_base_in_fp8(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", model_of("qwen3_moe"))
    to_fp8(source)
    model = load_model(str(source), "bfloat16")[0]
    found = exported(edited(model), "vllm", out=tmp_path / "a", model=str(source))
    assert "stored as fp8" in found.remarks[-1]
