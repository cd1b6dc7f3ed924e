"""The bundled model, its data and its hyper-parameters, as a user meets them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from easyedit_moe import factworld
from easyedit_moe.editors import EditMemory, make_editor, method_names
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.tokens import collate
from easyedit_moe.factworld import world as fw
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.capture import Routing, hooks, inference_mode_of, read_routing, run
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.statistics.corpus import load_texts


@pytest.fixture(scope="module")
def world() -> fw.World:
    return fw.build_world(0)


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return load_model("factworld", "float32")


def test_model_is_small_and_of_the_promised_shape(loaded: tuple) -> None:
    weights = factworld.model_path() / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    config = loaded[0].config
    assert config.num_hidden_layers >= 8
    assert config.num_experts >= 16
    assert config.num_experts_per_tok == 4
    assert len(MoELayerView(loaded[0]).layers) == config.num_hidden_layers


def test_bundled_data_are_what_the_seed_gives(world: fw.World) -> None:
    def read(name: str) -> object:
        return json.loads(factworld.data_path(name).read_text(encoding="utf-8"))

    assert read("counterfact.json") == fw.counterfact_records(world)
    assert read("easyedit.json") == fw.easyedit_records(world)
    assert load_texts("factworld") == fw.statistics_corpus(world)
    assert read("facts.json")["facts"] == world.facts


def test_records_of_both_layouts_are_all_usable() -> None:
    for name in ("factworld", "factworld-easyedit"):
        found = load_records(name)
        assert len(found.records) >= 300
        assert not found.skipped
        assert len({record.request.subject for record in found.records}) == len(found.records)
    for record in load_records("factworld").records:
        assert len(record.paraphrases) >= 4
        assert record.neighbours
        assert record.request.target_new != record.request.ground_truth


def test_world_is_as_rich_as_promised(world: fw.World, loaded: tuple) -> None:
    tok = loaded[1]
    assert len(world.subjects) >= 300
    assert len(fw.RELATIONS) >= 4
    assert all(len(tok(" " + subject)["input_ids"]) > 1 for subject in world.subjects)
    for relation in fw.RELATIONS:
        starts = [t.startswith("{}") for t in relation.templates]
        ends = [t.endswith("{}") for t in relation.templates]
        assert sum(starts) >= 1
        assert sum(ends) >= 1
        assert len(starts) - sum(starts) - sum(ends) >= 1
        assert sum(len(tok(" " + o)["input_ids"]) > 1 for o in relation.objects) >= 3


def test_neighbours_are_other_people_with_the_same_object(world: fw.World) -> None:
    for record in fw.counterfact_records(world):
        rewrite = record["requested_rewrite"]
        before, after = rewrite["prompt"].split("{}")
        for prompt in record["neighborhood_prompts"]:
            subject = prompt[len(before) : len(prompt) - len(after)]
            assert subject != rewrite["subject"]
            assert world.facts[subject][rewrite["relation_id"]] == rewrite["target_true"]["str"]


def test_corpus_mentions_no_edited_subject_and_no_evaluation_prompt(world: fw.World) -> None:
    corpus = "\n".join(load_texts("factworld"))
    assert not [subject for subject in world.evaluated if subject in corpus]
    assert all(subject in corpus for subject in world.bystanders)
    for record in fw.counterfact_records(world):
        rewrite = record["requested_rewrite"]
        assert rewrite["prompt"].format(rewrite["subject"]) not in corpus


def test_facts_are_recalled_over_all_templates(world: fw.World, loaded: tuple) -> None:
    pairs = [
        (template.format(subject), world.facts[subject][relation.name])
        for subject in world.subjects[::10]
        for relation in fw.RELATIONS
        for template in relation.templates
    ]
    exact = [score.exact for score in score_targets(*loaded, pairs)]
    assert sum(exact) / len(exact) >= 0.99


def test_every_expert_is_used(loaded: tuple) -> None:
    model, tok = loaded
    view = MoELayerView(model)
    counts = {index: torch.zeros(model.config.num_experts) for index in view.layers}

    def receive(index: int) -> object:
        def count(routing: Routing) -> None:
            counts[index] += torch.bincount(routing.expert.flatten(), minlength=model.config.num_experts)

        return count

    texts = fw.fact_sentences(fw.build_world(0), fw.build_world(0).subjects[:40])
    with inference_mode_of(model), hooks() as handles:
        for index, moe in view.layers.items():
            handles.append(read_routing(moe, receive(index)))
        for text in texts[::3]:
            run(model, collate([tok(text)["input_ids"]], 0))
    for index, count in counts.items():
        assert (count > 0).all(), index


def test_every_method_ships_hparams_for_the_bundled_and_the_three_real_models() -> None:
    for method in method_names():
        for name in ("factworld", "qwen3-30b-a3b", "gpt-oss-20b", "qwen3.6-35b-a3b"):
            assert load_hyperparams(f"{method}/{name}").alg_name == method


@pytest.mark.parametrize("method", ["MoTE", "Global", "MoEEdit-BCD"])
def test_shipped_settings_edit_facts_and_keep_others(method: str, loaded: tuple, tmp_path) -> None:
    model, tok = loaded
    records = load_records("factworld").records[300:316]
    before = {name: p.clone() for name, p in model.named_parameters()}
    hparams = load_hyperparams(f"{method}/factworld", stats_dir=str(tmp_path), dtype="float32")
    pre = evaluate(model, tok, records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = make_editor(hparams, progress=False).edit(model, tok, [r.request for r in records], EditMemory())
    post = evaluate(model, tok, records)
    result.patch.revert(model)
    assert pre.efficacy.mean <= 5
    assert post.efficacy.mean >= 85
    assert post.generalisation.mean >= 60
    assert post.specificity.mean >= 75
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
