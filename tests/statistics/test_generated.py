from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import hparams
from tiny import facts, requests, shared_model, state_of, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from easyedit_moe.editors import make_editor
from easyedit_moe.editors.statistics_plan import plan_statistics
from easyedit_moe.errors import CacheError, CoverageWarning, DataError, EditingWarning, HyperParamsError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import generated
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.generated import OPENINGS, GeneratedTexts, GenerationKey, corpus_texts, opening_ids
from easyedit_moe.statistics.moments import collect_moments
from easyedit_moe.storage.strict_json import write_checked_json

KEY = GenerationKey("f" * 64, ((5,), (6,), (7, 8)), 12, 0, 6)


def texts_of(key: GenerationKey = KEY, n_samples: int = 15, folder: Path | None = None, **more: Any) -> GeneratedTexts:
    return GeneratedTexts(more.get("model", shared_model()), more.get("tok", tiny_tokenizer()), key, n_samples, folder)


def test_texts_begin_with_the_openings_by_turns_and_end_at_the_length() -> None:
    made = texts_of()
    rows = [row for number in range(len(made)) for row in made.part(number)]
    assert (len(made), len(rows)) == (3, 15)
    for place, row in enumerate(rows):
        opening = KEY.openings[place % 3]
        assert tuple(row[: len(opening)]) == opening
        assert len(row) <= 12
        assert 0 not in row, "what ends a text is not part of it"
    assert len({tuple(row) for row in rows}) == 15


def test_a_part_is_the_same_whenever_it_is_made_and_depends_on_the_seed() -> None:
    whole = [texts_of().part(number) for number in (0, 1, 2)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert texts_of().part(2) == whole[2]
    assert torch.equal(torch.get_rng_state(), state)
    other = GenerationKey(KEY.fingerprint, KEY.openings, 12, 1, 6)
    assert texts_of(other).part(0) != whole[0]


def test_samples_follow_the_models_probabilities_whatever_its_generation_config_says() -> None:
    model = tiny_model()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    model.generation_config.temperature = 0.01
    key = GenerationKey("f", ((5,),), 2, 0, 4096)
    drawn = [row[1] if len(row) > 1 else 0 for row in texts_of(key, 4096, model=model).part(0)]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[5]])).logits[0, -1].double().softmax(-1)
    found = torch.bincount(torch.tensor(drawn), minlength=len(wanted)).double() / 4096
    top = wanted.topk(10).indices
    assert (found[top] - wanted[top]).abs().max() < 4 * (wanted.max() / 4096).sqrt()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    before = state_of(model)
    texts_of(model=model).part(0)
    after = state_of(model)
    assert before["training"] == after["training"]
    assert before["hooks"] == after["hooks"]


def test_parts_are_kept_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = texts_of(folder=tmp_path).part(1)
    (file,) = tmp_path.rglob("*.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["ids"] == first
    assert len(saved["texts"]) == 6
    again = texts_of(folder=tmp_path)
    with monkeypatch.context() as within:
        within.setattr(GeneratedTexts, "_sample", lambda *_: pytest.fail("sampled again"))
        assert again.part(1) == first
    assert texts_of(n_samples=8, folder=tmp_path).part(1) == first[:2], "more texts do not make others of the first"
    whole = file.read_bytes()
    assert saved.pop("digest")
    other_ids = [[token + 1 for token in row] for row in saved["ids"]]
    for damaged in (
        whole.replace(b" 1,", b" 2,", 1),
        json.dumps({**saved, "digest": "e", "ids": other_ids}).encode(),
        *(json.dumps({**saved, "ids": ids}).encode() for ids in (first[:2], None, [["a"]] * 6, [[-1]] * 6, [[]] * 6)),
        b"[]",
        b"{",
    ):
        file.write_bytes(damaged)
        with pytest.warns(EditingWarning, match="made anew now"):
            assert again.part(1) == first
        assert file.read_bytes() == whole
    write_checked_json(file, {**saved, "key": {**saved["key"], "seed": 3}})
    with pytest.raises(CacheError, match="another model or setting"):
        again.part(1)
    file.write_text(json.dumps(saved), encoding="utf-8")  # earlier versions wrote no digest
    assert again.part(1) == first


@pytest.mark.parametrize("changed", [{"fingerprint": "e"}, {"length": 11}, {"seed": 1}, {"openings": ((5,), (6,))}])
def test_other_settings_have_another_folder(changed: dict[str, Any]) -> None:
    assert GenerationKey(**{**vars(KEY), **changed}).folder_name() != KEY.folder_name()


def test_openings() -> None:
    plain, begins = tiny_tokenizer(), tiny_tokenizer("bos")
    words = opening_ids(plain)
    assert len(words) > 5
    assert all(len(ids) == 1 for ids in words)
    assert words[0] == tuple(encode_text(plain, OPENINGS[0])[:1])
    assert opening_ids(begins) == ((begins.bos_token_id,),)
    own = opening_ids(begins, ["The twin city of", "Angola"])
    assert own == tuple(tuple(encode_text(begins, text)) for text in ("The twin city of", "Angola"))
    with pytest.raises(HyperParamsError, match="no tokens"):
        opening_ids(plain, ["Angola", ""])
    with pytest.raises(HyperParamsError, match="generated_length must leave room"):
        GenerationKey("f", ((1, 2, 3),), 3, 0)


def test_a_model_that_cannot_generate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "generate", None)
    made = texts_of(model=model)
    with pytest.raises(DataError, match="no method generate"):
        made.part(0)


# ---------------------------------------------------------------- statistics of them


def run(data: Path, tok: PreTrainedTokenizerFast | None = None, model: Any = None, **changes: Any) -> Any:
    values = {"mom2_dataset": "generated", "mom2_n_samples": 40, "generated_length": 16, "coverage_target": None}
    hp = hparams(data, layers=[1, 2], **values | changes)
    view = MoELayerView(model or shared_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return layer_statistics(view, tok or tiny_tokenizer(), hp, [1, 2], model_fingerprint(view), progress=False)


def sampled(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.json"))


def test_statistics_are_of_the_sampled_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "PART_TEXTS", 64)
    found = run(tmp_path)
    (file,) = sampled(tmp_path)
    ids = json.loads(file.read_text(encoding="utf-8"))["ids"][:40]
    assert found[1].num_tokens == sum(map(len, ids))
    text = collect_moments(MoELayerView(shared_model()), tiny_tokenizer(), ids, [1])
    assert torch.equal(text[1].counts, found[1].counts)


def test_a_second_run_samples_nothing_and_other_settings_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    with monkeypatch.context() as within:
        within.setattr(GeneratedTexts, "_sample", lambda *_: pytest.fail("sampled again"))
        assert torch.equal(run(tmp_path)[2].keys, first[2].keys)
        run(tmp_path, mom2_n_samples=30)  # of the same part
    for changes in ({"generated_seed": 1}, {"generated_length": 9}, {"generated_openings": ["Angola is"]}):
        assert not torch.equal(run(tmp_path, **changes)[2].keys, first[2].keys)
    assert not torch.equal(run(tmp_path, model=tiny_model(seed=1))[2].keys, first[2].keys)


def test_no_more_is_sampled_than_coverage_asks_for(tmp_path: Path) -> None:
    run(tmp_path, mom2_n_samples=64 * 40, coverage_target=2.0)
    assert len(sampled(tmp_path)) == generated.ROUND_PARTS


def test_the_length_is_bounded_by_max_length(tmp_path: Path) -> None:
    run(tmp_path, max_length=5, generated_length=100)
    (file,) = sampled(tmp_path)
    assert max(map(len, json.loads(file.read_text(encoding="utf-8"))["ids"])) == 5


def test_coverage_is_told_while_it_gathers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="easyedit_moe.statistics.moments"):
        found = run(tmp_path, mom2_n_samples=64 * generated.ROUND_PARTS + 1, coverage_target=1e9)
    lines = [record.getMessage() for record in caplog.records if "so far" in record.getMessage()]
    assert len(lines) == 4, "two layers, two rounds"
    last = next(line for line in reversed(lines) if "layer 2:" in line)
    counts = found[2].counts
    assert f"least {int(counts.min()):,} of 24,000,000,000 wanted (expert {int(counts.argmin())})" in last


@pytest.mark.parametrize("method", ["MEMoE", "UnKE"])
def test_methods_that_train_sample_what_they_preserve(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def told(*arguments: Any) -> list[str]:
        seen.append(corpus_texts(*arguments))
        return seen[-1]

    where = "easyedit_moe.adapters.training" if method == "MEMoE" else "easyedit_moe.editors.unke"
    monkeypatch.setattr(f"{where}.corpus_texts", told)
    short = (
        {"steps": 2, "locality_n_samples": 6}
        if method == "MEMoE"
        else {"v_num_grad_steps": 2, "optim_num_step": 2, "max_length": 64}
    )
    name = "locality_dataset" if method == "MEMoE" else "preserve_dataset"
    values = {"alg_name": method, "model_name": "tiny", "layers": [1], "dtype": "float32", name: "generated", **short}
    hp = hyperparams_class(method).from_dict(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        result = make_editor(hp, progress=False).edit(tiny_model(), tiny_tokenizer(), facts(2))
    assert len(seen[0]) > 3
    assert all(isinstance(text, str) and text.strip() for text in seen[0])
    assert result.diagnosis is not None


def test_an_edit_needs_no_corpus(tmp_path: Path) -> None:
    hp = hparams(tmp_path, "MoTE", mom2_dataset="generated", mom2_n_samples=64, generated_length=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        result = make_editor(hp, progress=False).edit(tiny_model(), tiny_tokenizer(), facts(len(requests(2))))
    assert result.diagnosis is not None
    assert result.diagnosis.changed


def test_the_plan_counts_sampling(tmp_path: Path) -> None:
    model = shared_model()
    values = {"mom2_n_samples": 1000, "coverage_target": None}
    text, own = (plan_statistics(hparams(tmp_path, mom2_dataset=name, **values), model) for name in ("x", "generated"))
    assert text is not None
    assert own is not None
    assert own.most_tokens == text.most_tokens == 64_000, "max_length is 64 here"
    assert own.flops_per_token > 1.5 * text.flops_per_token
    bounded = plan_statistics(hparams(tmp_path, mom2_n_tokens=500, **values), model)
    assert bounded is not None
    assert bounded.most_tokens == 500
