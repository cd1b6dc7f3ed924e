"""Texts that weigh more in the statistics: the moments they lead to, their files, and what edits leave alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import TOK, edit, hparams
from tiny import TEXTS, requests, tiny_model
from torch import Tensor, nn

from easyedit_moe.editors import make_editor
from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.errors import DataError, HyperParamsError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import gather
from easyedit_moe.statistics.gather import fresh_statistics, layer_statistics
from easyedit_moe.statistics.moments import LayerMoments, collect_moments
from easyedit_moe.statistics.protected import mixed

pytestmark = pytest.mark.filterwarnings("ignore::easyedit_moe.errors.EditingWarning")

NAMES = ["Zoë Łukasz", "Ana from Angola", "Москва"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return tmp_path


def protecting(data: Path, variant: str = "Global", /, **changes: Any) -> Any:
    return hparams(data, variant, **({"protected_dataset": str(data / "names.txt")} | changes))


def moments(model: nn.Module, texts: list[str], dtype: torch.dtype = torch.float64) -> dict[int, LayerMoments]:
    return collect_moments(MoELayerView(model), TOK, texts, [1, 2], dtype=dtype, progress=False)


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
@pytest.mark.parametrize("times", [1, 7])
def test_they_count_as_if_they_stood_in_the_corpus_more_often(family: str, times: int) -> None:
    model = tiny_model(family)
    apart, together = (moments(model, TEXTS), moments(model, NAMES)), moments(model, TEXTS + NAMES * times)
    for layer, wanted in together.items():
        read, names = (part[layer].num_tokens for part in apart)
        share = times * names / (read + times * names)
        found = mixed(apart[0][layer], apart[1][layer], share)
        for mine, theirs in ((found.keys, wanted.keys), (found.output, wanted.output)):
            assert (mine - theirs).norm() < 1e-5 * theirs.norm(), "but for rounding in batches of other lengths"
        assert found.num_tokens == read + names, "counts are of what was read"
        assert int(found.counts.sum()) < int(wanted.counts.sum()) or times == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_that_one_of_them_does_not_reach_have_what_the_other_found(dtype: torch.dtype) -> None:
    keys = torch.rand(2, 4, 3, 3, dtype=dtype)
    counts = torch.tensor([[2, 0, 5, 0], [0, 3, 1, 0]])
    keys[counts == 0] = 0
    output = torch.rand(2, 2, 2, dtype=dtype)
    first, second = (LayerMoments(keys[n].clone(), counts[n], output[n].clone(), 7 - n) for n in range(2))
    found = mixed(first, second, 0.25)
    assert torch.equal(found.keys[0], keys[0, 0])
    assert torch.equal(found.keys[1], keys[1, 1])
    assert not found.keys[3].any()
    ours, theirs = 0.75 * 5 / 7, 0.25 * 1 / 4
    torch.testing.assert_close(found.keys[2], (ours * keys[0, 2] + theirs * keys[1, 2]) / (ours + theirs))
    torch.testing.assert_close(found.output, 0.75 * output[0] + 0.25 * output[1])
    assert found.counts.tolist() == [2, 3, 6, 0]
    assert found.num_tokens == 13
    assert found.keys.dtype == dtype


# ---------------------------------------------------------------- files


def test_both_are_kept_apart(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, collected = MoELayerView(tiny_model()), []
    original = gather.collect_moments

    def counting(*args: Any, **kwargs: Any) -> Any:
        collected.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(gather, "collect_moments", counting)

    def run(**changes: Any) -> dict[int, LayerMoments]:
        return layer_statistics(view, TOK, protecting(data, **changes), [1, 2], model_fingerprint(view), False)

    first = run()
    assert len(collected) == 2
    again, other = run(), run(protected_share=0.9)
    plain = layer_statistics(view, TOK, hparams(data), [1, 2], model_fingerprint(view), False)
    assert len(collected) == 2, "whatever the share, and with none"
    fresh = fresh_statistics(view, TOK, protecting(data), [1, 2], model_fingerprint(view), False)
    assert len(collected) == 4
    for layer in (1, 2):
        assert torch.equal(again[layer].keys, first[layer].keys)
        assert torch.equal(fresh[layer].keys, first[layer].keys)
        assert not torch.equal(other[layer].keys, first[layer].keys)
        assert plain[layer].num_tokens < first[layer].num_tokens
    (data / "names.txt").write_text("\n".join(NAMES[:2]), encoding="utf-8")
    changed = run()
    assert len(collected) == 5, "the corpus is not read again"
    assert not torch.equal(changed[1].keys, first[1].keys)


def test_bounds_of_the_corpus_are_not_theirs(data: Path) -> None:
    view = MoELayerView(tiny_model())
    few = protecting(data, mom2_n_tokens=5, coverage_target=1e-9)
    read = layer_statistics(view, TOK, few, [1], model_fingerprint(view), False)[1].num_tokens
    names = sum(len(encode_text(TOK, name)) for name in NAMES)
    first = len(encode_text(TOK, TEXTS[0]))
    assert read == names + first


# ---------------------------------------------------------------- edits


def last_states(model: nn.Module, texts: list[str]) -> Tensor:
    with torch.no_grad():
        found = [model(torch.tensor([encode_text(TOK, text)]), output_hidden_states=True) for text in texts]
    return torch.stack([one.hidden_states[-1][0, -1] for one in found]).double()


@pytest.mark.parametrize("variant", ["MoE-MEMIT", "MoE-AlphaEdit", "MoTE", "MoEEdit-BCD"])
def test_edits_change_them_less(variant: str, data: Path) -> None:
    moved = []
    texts = [f"{name} is" for name in ("Boris Vian", "Ilse Ruf", "Old Tom")]
    (data / "names.txt").write_text("\n".join(texts), encoding="utf-8")
    ranked = {"nullspace_threshold": None, "nullspace_relative": False, "nullspace_rank": 0.5}
    metric = {"lambda_reg": 1.0} if variant == "MoE-MEMIT" else ranked
    for share in (None, 0.99):
        model = tiny_model()
        before = last_states(model, texts)
        changes = {} if share is None else {"protected_dataset": str(data / "names.txt"), "protected_share": share}
        edit(model, hparams(data, variant, **metric, **changes), requests())
        moved.append(float((last_states(model, texts) - before).norm()))
    assert 0 < moved[1] < 0.7 * moved[0]


# ---------------------------------------------------------------- settings and plans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protected_dataset": ""}, "protected_dataset must be None, or texts"),
        ({"protected_dataset": "generated"}, "protected_dataset must be None, or texts"),
        ({"protected_share": 0.0}, "protected_share must be in"),
        ({"protected_share": 1.0}, "protected_share must be in"),
        ({"protected_share": float("nan")}, "protected_share"),
        ({"metric": "identity"}, "None where no statistics are read"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(HyperParamsError, match=message):
        protecting(data, **changes)


def test_a_missing_file_is_named_and_changes_nothing(data: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        edit(model, protecting(data, protected_dataset=str(data / "nowhere.txt")), requests())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (data / "stats").exists() or not list((data / "stats").rglob("layer*"))


def test_plans_count_their_moments(data: Path) -> None:
    model, settings = tiny_model(), protecting(data)
    plain = replace(settings, protected_dataset=None)
    with_them, without = (plan_statistics(hp, model) for hp in (settings, plain))
    assert with_them is not None
    assert without is not None
    assert without.disk_bytes < with_them.disk_bytes <= 2 * without.disk_bytes
    peaks = [make_editor(hp, progress=False).plan(model, edits=3) for hp in (settings, plain)]
    stages = [next(stage for stage in one.stages if stage.name == "statistics") for one in peaks]
    assert stages[0].working - stages[1].working == stages[1].kept
    assert peaks[0].peak >= peaks[1].peak
