from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from record_files import (
    EASYEDIT,
    KNOWEDIT_ZSRE,
    NEED_SHARED,
    ROME,
    SHARED,
    WIKI_COUNTERFACT,
    WIKI_RECENT,
    WIKIBIGEDIT,
    WIKIBIO,
    ZSRE,
    saved,
)
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.facts.records import PROTOCOLS, Probe, ProbeGroup, RecordSet, load_facts, load_records, parse_records
from easyedit_moe.facts.requests import EditRequest

SANITATION = {
    "K_F": [
        {"question": "Which bird is a kea?", "subject": "kea", "ground_truth": "Parrot", "target_new": "I don't know."},
        {"question": "Which bird is a tui?", "subject": "tui", "ground_truth": "Eater", "target_new": "I don't know."},
    ],
    "K_R": [{"question": f"What is {i}?", "ground_truth": f"number {i}", "target_new": "x"} for i in range(3)],
}  # fmt: skip


def only(found: RecordSet) -> Any:
    assert len(found.records) == 1
    assert found.skipped == found.dropped == ()
    assert found.protocol in PROTOCOLS
    return found.records[0]


def test_rome_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [ROME]))
    record = only(found)
    assert found.protocol == "counterfact"
    assert record.request == EditRequest("Angola is in", "Angola", "Russia", "Africa")
    assert record.paraphrases == ("Look: Angola is in", "Angola lies in")
    assert record.neighbours == (("Kenya is in", "Africa"), ("Ghana is in", "Africa"))


def test_easyedit_layout(tmp_path: Path) -> None:
    found = load_records(str(saved(tmp_path, [EASYEDIT])))
    record = only(found)
    assert found.protocol == "counterfact"
    assert record.request == EditRequest("Angola is in", "Angola", "Russia", "Africa")
    assert record.paraphrases == ("Angola lies in",)
    assert record.neighbours == (("Kenya is in", "Africa"),)


def test_easyedit_layout_with_lists_and_without_extras() -> None:
    lists = EASYEDIT | {
        "rephrase_prompt": ["a", "b"],
        "locality_prompt": ["c", "d"],
        "locality_ground_truth": ["e", "f"],
    }
    assert only(parse_records([lists])).neighbours == (("c", "e"), ("d", "f"))
    bare = {k: EASYEDIT[k] for k in ("prompt", "subject", "target_new", "ground_truth")}
    assert only(parse_records([bare])).paraphrases == ()
    assert only(parse_records([bare])).neighbours == ()


def test_zsre_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [ZSRE]))
    record = only(found)
    assert found.protocol == "zsre"
    assert record.request == EditRequest("Where is Angola?", "Angola", "Africa", None)
    assert record.paraphrases == ("Angola is where?",)
    assert record.neighbours == (("nq question: who sang?", "Ana"),)


def test_zsre_alternative(tmp_path: Path) -> None:
    path = saved(tmp_path, [ZSRE])
    found = load_records(path, "zsre-alternative")
    assert found.protocol == "zsre-alternative"
    assert only(found).request == EditRequest("Where is Angola?", "Angola", "Russia", "Africa")
    assert only(found).neighbours == (("nq question: who sang", "Ana"),)
    assert load_facts(path, protocol="zsre-alternative").facts == found.records
    assert load_facts(path).facts == load_records(path).records == parse_records([ZSRE], protocol="zsre").records


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [({"loc": "who sang?"}, "who sang?"), ({"loc": "who sang? "}, "who sang? "), ({"loc": "nq: who"}, "nq: who?")],
)
def test_zsre_locality_prompts_are_questions(changes: dict[str, Any], prompt: str) -> None:
    assert only(parse_records([ZSRE | changes])).neighbours == ((prompt, "Ana"),)


def test_zsre_as_published_needs_no_alternative() -> None:
    plain = {name: value for name, value in ZSRE.items() if name not in ("alt", "pred", "cond")}
    assert only(parse_records([plain])).request.target_new == "Africa"
    assert (
        only(parse_records([ZSRE | {"alt": "", "answers": [["Africa", "the South"]]}])).request.target_new == "Africa"
    )


def test_a_layout_is_read_by_a_protocol_that_it_has(tmp_path: Path) -> None:
    judged = parse_records([ROME], protocol="token_accuracy")
    assert (judged.protocol, judged.records) == ("token_accuracy", parse_records([ROME]).records)
    with pytest.raises(DataError, match=r"by the protocol zsre or zsre-alternative; 'zsre_alternative' was asked for"):
        parse_records([ZSRE], protocol="zsre_alternative")
    with pytest.raises(DataError, match="by the protocol token_accuracy; 'counterfact' was asked for"):
        load_records(saved(tmp_path, [WIKI_RECENT]), "counterfact")


def test_the_tokens_of_both_protocols_of_zsre_are_scored_alike() -> None:
    """Against a forward per token, as MEMIT's evaluation asks: each target token after the ones before it."""
    model, tok = tiny_model(), tiny_tokenizer()
    for protocol in ("zsre", "zsre-alternative"):
        record = only(parse_records([ZSRE | {"answers": ["Danielle Darrieux"]}], protocol=protocol))
        result = evaluate(model, tok, [record], protocol)
        pairs = [(record.request.prompt, record.request.target_new), *record.neighbours]
        hits = []
        for prompt, target in pairs:
            labels = tok(" " + target, add_special_tokens=False)["input_ids"]
            ids = tok(prompt, add_special_tokens=False)["input_ids"]
            right = [
                int(model(torch.tensor([ids + labels[:i]])).logits[0, -1].argmax()) == token
                for i, token in enumerate(labels)
            ]
            hits.append(100 * sum(right) / len(right))
        assert (result.protocol, result.efficacy.mean, result.specificity.mean) == (protocol, *hits)


def test_wiki_counterfact_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [WIKI_COUNTERFACT]))
    record = only(found)
    assert found.protocol == "token_accuracy"
    assert record.request == EditRequest("The capital of Angola is", "Angola", "Lima", "Luanda")
    assert record.paraphrases == ()
    specificity = Probe("The continent of Angola is", ("Africa",))
    forgetfulness = Probe("The capital of Angola, which is not Lima, is", ("Luanda",))
    assert record.locality == (
        ProbeGroup("Relation_Specificity", (specificity,)),
        ProbeGroup("Forgetfulness", (forgetfulness,)),
    )
    assert record.neighbours == ((specificity.prompt, "Africa"), (forgetfulness.prompt, "Luanda"))
    assert record.portability == (ProbeGroup("Subject_Aliasing", (Probe("The capital of Ngola is", ("Lima",)),)),)


def test_wiki_recent_layout(tmp_path: Path) -> None:
    record = only(load_records(saved(tmp_path, [WIKI_RECENT])))
    assert record.request == EditRequest("Ana Lopes lives in", "Ana Lopes", "Porto", None)
    assert record.neighbours == (("Ana Lopes works as", "cook"),)
    assert record.locality == (ProbeGroup("Relation_Specificity", (Probe("Ana Lopes works as", ("cook", "chef")),)),)
    assert [group.name for group in record.portability] == ["Reasoning", "Logical_Generalization"]
    assert [probe.answers for probe in record.portability[0].probes] == [("Portugal", "PT"), ("Douro",)]
    assert record.portability[1].probes == (Probe("Does Ana Lopes live?", ("yes", "right")),)


def test_knowedit_zsre_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [KNOWEDIT_ZSRE]))
    record = only(found)
    assert found.protocol == "token_accuracy"
    assert record.request == EditRequest("What is the capital of Angola?", "Angola", "Lima", "Luanda")
    assert record.paraphrases == ("Which town is Angola's capital?",)
    assert record.locality[0].probes[0].answers == ("Africa", "south")
    assert record.portability[0].probes[0].answers == ("Rimac",)


def test_wikibio_layout(tmp_path: Path) -> None:
    record = only(load_records(saved(tmp_path, [WIKIBIO])))
    assert record.request == EditRequest(WIKIBIO["text"], "ana lopes", "She was born in Porto.", None)
    assert record.neighbours == (("ana lopes works as", "cook"),)
    assert record.portability == ()
    assert only(parse_records([{k: v for k, v in WIKIBIO.items() if k != "locality"}])).neighbours == ()


def test_wikibigedit_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [WIKIBIGEDIT]))
    record = only(found)
    assert found.protocol == "token_accuracy"
    assert record.request == EditRequest("What is the capital of Angola?", "Angola", "Lima", None)
    assert record.paraphrases == ("Which town governs Angola?",)
    assert record.neighbours == (("What is the capital of Kenya?", "Nairobi"),)
    assert record.locality == (ProbeGroup("locality", (Probe("What is the capital of Kenya?", ("Nairobi",)),)),)
    assert record.portability == (
        ProbeGroup("personas", (Probe("Yo, what's Angola's capital?", ("Lima",)),)),
        ProbeGroup("mhop", (Probe("Which river flows through Angola's capital?", ("Rimac",)),)),
    )


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_wikibigedit_without_extras(nothing: Any, tmp_path: Path) -> None:
    extras = ("rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans")
    bare = only(load_records(saved(tmp_path, [WIKIBIGEDIT | dict.fromkeys(extras, nothing)])))
    assert (bare.paraphrases, bare.neighbours, bare.locality, bare.portability) == ((), (), (), ())
    assert bare == only(parse_records([{k: v for k, v in WIKIBIGEDIT.items() if k not in extras}]))


def test_sanitation_deals_out_what_is_to_be_retained(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, SANITATION))
    first, second = found.records
    assert (found.protocol, found.skipped, found.dropped) == ("token_accuracy", (), ())
    assert first.request == EditRequest("Which bird is a kea?", "kea", "I don't know.", "Parrot")
    assert first.neighbours == (("What is 0?", "number 0"), ("What is 2?", "number 2"))
    assert second.neighbours == (("What is 1?", "number 1"),)
    assert second.locality[0].name == "Retained"


def test_sanitation_without_subjects_or_lists() -> None:
    forget = [{"question": "Which bird is a kea?", "ground_truth": "Parrot", "target_new": "I don't know."}]
    assert parse_records({"success": forget, "locality": []}).records[0].request.subject is None
    with pytest.raises(DataError, match="none of 0 records can be used"):
        parse_records({"K_F": [], "K_R": []})
    with pytest.raises(DataError, match="must hold two lists"):
        parse_records({"K_F": "text", "K_R": []})
    found = parse_records({"K_F": [None, *SANITATION["K_F"]], "K_R": [5, {"question": "What is 7?"}]})
    assert [number for number, _ in found.skipped] == [0]
    assert len(found.records) == 2
    assert [(number, "has no answer" in reason) for number, reason in found.dropped] == [(1, True)]


def test_convsent_is_refused_for_what_it_is() -> None:
    with pytest.raises(DataError, match="ConvSent file"):
        parse_records([{"ent": "tea", "pos": ["I love it."], "neg": ["I hate it."]}])


@pytest.mark.parametrize("base", [ZSRE, EASYEDIT])
def test_portability_files_of_zsre_and_counterfact(base: dict[str, Any]) -> None:
    question = {"Recalled Relation": "(a, b)", "New Question": "Which sea borders it?", "New Answer": "the Baltic"}
    record = only(parse_records([base | {"portability": question}]))
    assert record.portability == (ProbeGroup("one_hop", (Probe("Which sea borders it?", ("the Baltic",)),)),)
    assert only(parse_records([base | {"portability": {}}])).portability == ()
    found = parse_records([base | {"portability": {"New Question": "Which?"}}, base | {"portability": "x"}])
    assert [record.portability for record in found.records] == [(), ()]
    assert [number for number, _ in found.dropped] == [0, 1]


def _specificity(*probes: Any) -> dict[str, Any]:
    return WIKI_RECENT | {"locality": {"Relation_Specificity": list(probes)}}


def test_lists_of_prompts_go_with_their_answers() -> None:
    both = only(parse_records([_specificity({"prompt": ["p", "q"], "ground_truth": [["a", "b"], "c"]})]))
    assert both.locality[0].probes == (Probe("p", ("a", "b")), Probe("q", ("c",)))
    single = only(parse_records([_specificity({"prompt": ["p"], "ground_truth": [["a", "b"]]})]))
    assert single.locality[0].probes == (Probe("p", ("a", "b")),)
    shared = only(parse_records([_specificity({"prompt": ["p", "q"], "ground_truth": "a"})]))
    assert shared.neighbours == (("p", "a"), ("q", "a"))
    as_dict = WIKI_RECENT | {"locality": {"Relation_Specificity": {"prompt": "p", "ground_truth": "a"}}}
    assert only(parse_records([as_dict])).neighbours == (("p", "a"),)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "ground_truth": []}, "'p' has no answer"),
        ({"prompt": "p", "ground_truth": [[""], " "]}, "'p' has no answer"),
        ({"prompt": "p"}, "'p' has no answer"),
        ({"prompt": "p", "ground_truth": [True]}, "must be strings or lists of strings; found True"),
        ({"prompt": "p", "ground_truth": {"a": "b"}}, "must be strings or lists of strings"),
        ({"prompt": "", "ground_truth": "a"}, "'prompt' is missing"),
        ({"prompt": ["p", " "], "ground_truth": "a"}, "must not be blank"),
        ({"prompt": 5, "ground_truth": "a"}, "must be strings; found 5"),
        ({"prompt": ["p", "q"], "ground_truth": ["a", "b", "c"]}, "2 prompts, but 3 answers"),
        ("p", "must be a dict"),
    ],
)
def test_unusable_probes_are_dropped_with_the_reason(bad: Any, reason: str) -> None:
    good = {"prompt": "Ana Lopes works as", "ground_truth": "cook"}
    found = parse_records([WIKI_RECENT, _specificity(bad, good)])
    assert [len(record.neighbours) for record in found.records] == [1, 1]
    assert found.skipped == ()
    assert [number for number, _ in found.dropped] == [1]
    assert found.dropped[0][1].startswith("Relation_Specificity: ")
    assert reason in found.dropped[0][1]


def test_a_group_that_is_not_a_list_is_dropped() -> None:
    found = parse_records([WIKI_RECENT | {"portability": {"Reasoning": "x", "Subject_Aliasing": None}}])
    assert found.records[0].portability == ()
    assert found.dropped == ((0, "Reasoning: must be a list of probes; found 'x'."),)


def test_knowedit_records_are_judged_by_token_accuracy() -> None:
    found = parse_records([WIKI_COUNTERFACT, WIKI_RECENT, KNOWEDIT_ZSRE])
    model, tok = tiny_model(), tiny_tokenizer()
    result = evaluate(model, tok, found.records, found.protocol)
    assert result.protocol == "token_accuracy"
    assert (result.efficacy.count, result.generalisation.count, result.specificity.count) == (3, 1, 3)
    assert PROTOCOLS["token_accuracy"] == "teacher-forced token accuracy"
    same = evaluate(model, tok, found.records, "zsre")
    assert (same.efficacy, same.specificity, same.utility) == (result.efficacy, result.specificity, result.utility)


def test_single_texts_where_a_list_is_usual() -> None:
    assert only(parse_records([ZSRE | {"answers": "Africa"}])).request.target_new == "Africa"
    rome = only(parse_records([ROME | {"paraphrase_prompts": "Angola lies in", "neighborhood_prompts": "Kenya is in"}]))
    assert rome.paraphrases == ("Angola lies in",)
    assert rome.neighbours == (("Kenya is in", "Africa"),)


def _rewrite(**changes: Any) -> dict[str, Any]:
    return ROME | {"requested_rewrite": ROME["requested_rewrite"] | changes}


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (ROME, _rewrite(subject=""), "missing 'subject', which other records of this file have"),
        (ROME, _rewrite(target_true=None), "missing 'target_true'"),
        (ROME, _rewrite(target_new={"str": " "}), "'target_new' is empty"),
        (ROME, ROME | {"requested_rewrite": None}, "'requested_rewrite' must be a dict"),
        (ROME, {"requested_rewrite": ROME["requested_rewrite"]}, "missing 'neighborhood_prompts'"),
        (ROME, EASYEDIT, "missing 'requested_rewrite'"),
        (ROME, ROME | {"paraphrase_prompts": [None]}, "must be strings"),
        (EASYEDIT, EASYEDIT | {"subject": "Peru"}, "'Peru' does not occur"),
        (EASYEDIT, EASYEDIT | {"ground_truth": None}, "missing the true answer ('ground_truth')"),
        (EASYEDIT, EASYEDIT | {"subject": None}, "missing 'subject'"),
        (EASYEDIT, EASYEDIT | {"target_new": ["Rome"]}, "'target_new' must be a string; found ['Rome']"),
        (EASYEDIT, EASYEDIT | {"target": "Rome"}, "'target_new' and 'target' both give target_new"),
        (EASYEDIT, EASYEDIT | {"locality_prompt": ["a", "b"]}, "2 locality prompts, but 1 answers"),
        (EASYEDIT, EASYEDIT | {"locality_ground_truth": ["a", "b"]}, "1 locality prompts, but 2 answers"),
        (EASYEDIT, EASYEDIT | {"rephrase_prompt": 5}, "must be strings"),
        (ZSRE, ZSRE | {"answers": []}, "'answers' is empty; the protocol zsre edits to its first one"),
        (ZSRE, {k: v for k, v in ZSRE.items() if k != "subject"}, "missing 'subject'"),
        (ZSRE, ZSRE | {"rephrase": None}, "missing 'rephrase'"),
        (ZSRE, ZSRE | {"loc": ["a", "b"]}, "'loc' must be one prompt"),
        (ZSRE, ZSRE | {"loc_ans": True}, "must be strings"),
        (ZSRE, ZSRE | {"loc_ans": " "}, "missing 'loc_ans'"),
        (ROME, _rewrite(target_true={"str": ""}), "missing 'target_true'"),
        (ROME, "text", "A record must be a dict; found str"),
        (WIKI_RECENT, WIKI_RECENT | {"subject": None}, "missing 'subject'"),
        (WIKI_RECENT, WIKI_RECENT | {"subject": "Peru"}, "'Peru' does not occur"),
        (WIKI_RECENT, WIKI_RECENT | {"target_new": ""}, "'target_new' is empty"),
        (WIKI_RECENT, WIKI_RECENT | {"ground_truth": [True]}, "must be strings or lists of strings"),
        (WIKI_RECENT, WIKI_RECENT | {"locality": []}, "'locality' must be a dict of groups"),
        (WIKIBIO, WIKIBIO | {"labels": None}, "'target_new' is missing or empty"),
        (WIKIBIO, WIKIBIO | {"concept": "Ana Lopez"}, "does not occur"),
        (WIKIBIGEDIT, {k: v for k, v in WIKIBIGEDIT.items() if k != "subject"}, "missing 'subject'"),
        (WIKIBIGEDIT, WIKIBIGEDIT | {"ans": ""}, "'target_new' is empty"),
        (WIKIBIGEDIT, WIKIBIGEDIT | {"rephrase": 5}, "must be strings"),
    ],
)  # fmt: skip
def test_unusable_records_are_skipped_with_the_reason(good: Any, bad: Any, reason: str, tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [good, bad, good]))
    assert len(found.records) == 2
    assert [position for position, _ in found.skipped] == [1]
    assert reason in found.skipped[0][1]


def test_a_broken_first_record_is_skipped_too() -> None:
    found = parse_records([{}, None, ZSRE])
    assert found.protocol == "zsre"
    assert [number for number, _ in found.skipped] == [0, 1]
    assert found.records == parse_records([ZSRE]).records


def test_no_usable_record() -> None:
    with pytest.raises(DataError, match="none of 2 records can be used; the first, record 0: 'target_new' is empty"):
        parse_records([ZSRE | {"alt": ""}] * 2, protocol="zsre-alternative")
    with pytest.raises(DataError, match="non-empty"):
        parse_records([])


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown layout with the keys a, q\. Expected columns"):
        load_records(saved(tmp_path, [{"q": "?", "a": "!"}]))


@pytest.mark.parametrize("items", [{}, {"a": 1}, [], [1], "text", 5])
def test_not_a_list_of_records(items: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold a non-empty list of records"):
        load_records(saved(tmp_path, items))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{", encoding="utf-8")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name, match in (("a.json", "is not valid JSON.*cut off"), ("b.json", "UTF-16")):
        with pytest.raises(DataError, match=match):
            load_records(tmp_path / name)
    for missing in (tmp_path / "c.json", tmp_path, "factwold"):
        with pytest.raises(DataError, match="does not exist"):
            load_records(missing)


@NEED_SHARED
def test_real_counterfact_records() -> None:
    found = load_records(SHARED / "counterfact-edit-200.json")
    assert (found.protocol, len(found.records), found.skipped) == ("counterfact", 200, ())
    first = found.records[0]
    assert first.request == EditRequest(
        "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English", "French"
    )
    assert first.neighbours == (("Michel Rocard is a native speaker of", "French"),)


@NEED_SHARED
def test_real_zsre_records() -> None:
    path = SHARED / "zsre-mend-100.json"
    found = load_records(path, "zsre-alternative")
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert found.protocol == "zsre-alternative"
    assert len(found.records) + len(found.skipped) == len(raw) == 100
    assert len(found.records) >= 90
    for position, reason in found.skipped:
        assert raw[position]["alt"] == "" or raw[position]["subject"] not in raw[position]["src"], reason
    assert found.records[0].request == EditRequest(
        "What is the product made by UniFirst?", "UniFirst", "unmanned aircraft", "uniform"
    )
    published = load_records(path)
    assert published.protocol == "zsre"
    assert [r.request.target_new for r in published.records[:3]] == ["uniform", "Serpens", "1987"]
    assert all(prompt.endswith("?") for r in published.records for prompt, _ in r.neighbours)


def test_zsre_without_true_answers_is_the_alternative() -> None:
    plain = {name: value for name, value in ZSRE.items() if name != "answers"}
    found = parse_records([plain])
    assert (found.protocol, only(found).request) == (
        "zsre-alternative",
        EditRequest("Where is Angola?", "Angola", "Russia"),
    )
