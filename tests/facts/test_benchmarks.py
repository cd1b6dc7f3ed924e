"""Further benchmarks in their published layouts, made by hand, with one record of every odd kind."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from baselines import settings
from record_files import saved
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.editors import make_editor
from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.portability import portability
from easyedit_moe.facts.records import EvaluationRecord, Probe, ProbeGroup, RecordSet, load_facts, load_records
from easyedit_moe.facts.requests import EditRequest


def read(folder: Path, items: Any) -> RecordSet:
    path = saved(folder, items)
    found = load_records(path)
    assert load_facts(path).facts == found.records
    return found


def groups(record: EvaluationRecord) -> dict[str, list[Probe]]:
    return {group.name: list(group.probes) for group in record.portability}


# ---------------------------------------------------------------- MQuAKE


def rewrite(prompt: str, subject: str, new: str, old: str, question: str | None = None) -> dict[str, Any]:
    made = {"prompt": prompt, "relation_id": "P1", "subject": subject, "target_new": {"str": new, "id": "Q1"}}
    return {**made, "target_true": {"str": old, "id": "Q2"}, "question": question}


SPORT = rewrite("{} is associated with the sport of", "Dudley", "cricket", "football", "Which sport is Dudley's?")
ORIGIN = rewrite("{} was created in the country of", "cricket", "Italy", "England", "Where was cricket created?")
CASE = {
    "case_id": 1, "requested_rewrite": [SPORT, ORIGIN],
    "questions": ["What is the capital of the country of Dudley's sport?", "Which city governs it?"],
    "answer": "London", "answer_alias": ["London UK"], "new_answer": "Rome", "new_answer_alias": ["Roma", "Rome"],
    "single_hops": [],
    "new_single_hops": [
        {"question": "Where was cricket created?", "cloze": "x", "answer": "Italy", "answer_alias": []},
        {"question": "What is the capital of Italy?", "cloze": "y", "answer": "Rome", "answer_alias": ["Roma"]},
    ],
    "orig": {"triples": []},
}  # fmt: skip


def test_mquake_is_one_record_per_edit_and_multi_hop_questions_stand_with_the_last(tmp_path: Path) -> None:
    found = read(tmp_path, [CASE])
    first, last = found.records
    assert found.protocol == "token_accuracy"
    assert first.request == EditRequest("Dudley is associated with the sport of", "Dudley", "cricket", "football")
    assert (first.paraphrases, first.portability) == (("Which sport is Dudley's?",), ())
    assert last.request.target_new == "Italy"
    multi = groups(last)["multi_hop"]
    assert [probe.prompt for probe in multi] == CASE["questions"]
    assert {probe.answers for probe in multi} == {("Rome", "Roma")}
    assert groups(last)["single_hops"] == [Probe("What is the capital of Italy?", ("Rome", "Roma"))]


def test_mquake_cases_share_edits(tmp_path: Path) -> None:
    other = {**CASE, "requested_rewrite": [ORIGIN], "questions": "Who rules where cricket comes from?"}
    first = {**CASE, "requested_rewrite": [ORIGIN, SPORT], "new_single_hops": None, "new_answer_alias": []}
    found = read(tmp_path, [first, other, {**CASE, "requested_rewrite": [rewrite("{} is", "Bo", "x", "y")]}])
    assert [record.request.subject for record in found.records] == ["cricket", "Dudley", "Bo"]
    asked = [probe.prompt for probe in groups(found.records[0])["multi_hop"]]
    assert asked == ["Who rules where cricket comes from?"], "the second case's, whose edit was made already"
    assert len(groups(found.records[1])["multi_hop"]) == 2
    assert found.records[2].paraphrases == (), "a rewrite of MQuAKE-T without a question"


def test_mquake_records_that_can_t_be_used(tmp_path: Path) -> None:
    bad = [
        {**CASE, "requested_rewrite": []},
        {**CASE, "requested_rewrite": ["text"]},
        {**CASE, "requested_rewrite": [rewrite("{} is", "Bo", "", "y")]},
        None,
        {**CASE, "requested_rewrite": [SPORT], "new_answer": "", "new_answer_alias": []},
    ]
    found = load_records(saved(tmp_path, [CASE, *bad]))
    assert [number for number, _ in found.skipped] == [1, 2, 3, 4]
    assert "'target_new' is empty" in found.skipped[2][1]
    assert len(found.records) == 2
    assert found.dropped == tuple((0, f"multi_hop: {question!r} has no answer.") for question in CASE["questions"])


# ---------------------------------------------------------------- RippleEdits


def ripple(prompt: str, original: str | None, relation: str = "R", **tests: Any) -> dict[str, Any]:
    edit: dict[str, Any] = {"prompt": prompt, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    if original is not None:
        edit["original_fact"] = {"prompt": original, "subject_id": "Q1", "relation": relation, "target_id": "Q3"}
    return {"example_type": "popular" if original else "recent", "edit": edit, **tests}


def asked_of(prompt: str | None, *answers: Any, kind: str = "regular") -> dict[str, Any]:
    listed = [{"value": value, "aliases": aliases} for value, aliases in answers]
    query = {"prompt": prompt, "answers": listed, "query_type": kind, "subject_id": "Q1", "relation": "R"}
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": [query]}


def test_rippleedits(tmp_path: Path) -> None:
    item = ripple(
        "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "The name of the country of citizenship of Leonardo DiCaprio is United States of America.",
        Relation_Specificity=[asked_of("The name of the mother of Leonardo DiCaprio is", ("Irmelin", ["I. D.", ""]))],
        Logical_Generalization=[], Subject_Aliasing=[asked_of("The citizenship of Leo is", ("Syria", []))],
        Compositionality_I=[asked_of("The currency of his country is", ("pound", ["SYP"]), ("lira", []), kind="2")],
        Compositionality_II=[asked_of(None, ("x", []))], Forgetfulness=[asked_of("Leo is also of", ("", []))],
    )  # fmt: skip
    found = read(tmp_path, [item])
    (record,) = found.records
    prompt = "The name of the country of citizenship of Leonardo DiCaprio is"
    assert record.request == EditRequest(prompt, "Leonardo DiCaprio", "Syria", "United States of America")
    assert record.neighbours == (("The name of the mother of Leonardo DiCaprio is", "Irmelin"),)
    assert record.locality == (
        ProbeGroup("Relation_Specificity", (Probe(record.neighbours[0][0], ("Irmelin", "I. D.")),)),
    )
    assert groups(record) == {
        "Subject_Aliasing": [Probe("The citizenship of Leo is", ("Syria",))],
        "Compositionality_I": [Probe("The currency of his country is", ("pound", "SYP", "lira"))],
    }
    assert len(found.dropped) == 2


@pytest.mark.parametrize(
    ("sentence", "subject", "target"),
    [
        ("The name of the position held by Ada is king of France.", "Ada", "king of France"),
        ("The name of the country which Ada of York is associated with is Peru.", "Ada of York", "Peru"),
        ("The number of children Ada has is 3.", "Ada", "3"),
        ("The name of the award Ada Lo won is Fields Medal.", "Ada Lo", "Fields Medal"),
        ("Part Two follows Part One.", "Part Two", "Part One"),
        ("Part One is followed by Part Two.", "Part One", "Part Two"),
        ("The names of the siblings of Ada are Bo.", "Ada", "Bo"),
        ("The name of the director of Duke of Oil is Bo St.", "Duke of Oil", "Bo St"),
        ("The date of birth of Ada is 1 May 1900", "Ada", "1 May 1900"),
        ("The name of the currency in Peru is sol.", "Peru", "sol"),
        ("Something else is so.", None, "so"),
    ],
)
def test_rippleedits_name_subject_and_target_in_the_sentence(
    sentence: str, subject: str | None, target: str, tmp_path: Path
) -> None:
    (record,) = read(tmp_path, [ripple(sentence, None)]).records
    assert (record.request.subject, record.request.target_new, record.request.ground_truth) == (subject, target, None)


def test_rippleedits_without_a_target(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [ripple("The mother of Ada is Bo.", None), ripple("Ada", None), {"edit": 1}]))
    assert [number for number, _ in found.skipped] == [1, 2]
    assert "does not end with 'is', 'are' or 'follows' and a target" in found.skipped[0][1]


# ---------------------------------------------------------------- unstructured


UNKE = {
    "id": 0, "question": "What is known of Ada Lo?", "answer": "Ada Lo is a cook. She lives in Lima.",
    "para_question": "What do we know about Ada Lo?", "sub_question": ["Where does she live?", "What is she?"],
    "sub_answer": ["Lima", "a cook"],
}  # fmt: skip


def test_unkebench(tmp_path: Path) -> None:
    single = {**UNKE, "question": "q", "sub_question": "Where?", "sub_answer": "Lima", "para_question": ["p1", "p2"]}
    bad = {**UNKE, "question": "r", "sub_answer": ["Lima"]}
    bare = {"question": "s", "answer": "A text.", "para_question": "", "sub_question": [], "sub_answer": []}
    found = read(tmp_path, [UNKE, single, bad, bare])
    first, second, third = found.records
    assert found.protocol == "unstructured"
    assert first.request == EditRequest(UNKE["question"], None, UNKE["answer"], None)
    assert groups(first)["sub_questions"] == [
        Probe("Where does she live?", ("Lima",)), Probe("What is she?", ("a cook",)),
    ]  # fmt: skip
    assert (second.paraphrases, len(groups(second)["sub_questions"])) == (("p1", "p2"), 1)
    assert (third.paraphrases, third.portability) == ((), ())
    assert found.skipped == ((2, "2 sub-questions, but 1 answers."),)


def test_unke_edits_a_text_without_a_subject(tmp_path: Path) -> None:
    (record,) = read(tmp_path, [UNKE]).records
    model, tok = tiny_model(), tiny_tokenizer()
    hp = settings("UnKE", layers=[1], fact_token="last", preserve_n_samples=0, optim_num_step=2, v_num_grad_steps=2)
    editor = make_editor(hp, progress=False)
    assert not editor.needs_subject()
    assert editor.edit(model, tok, [record.request]).patch.names
    assert portability(model, tok, [record]).count == 1
    with_kl = settings("UnKE", layers=[1], fact_token="last", kl_factor=0.1)
    assert make_editor(with_kl, progress=False).needs_subject()


def akew(rewrite: Any, **more: Any) -> dict[str, Any]:
    return {"case_id": 0, "requested_rewrite": rewrite, **more}


def test_akew(tmp_path: Path) -> None:
    triplets = [{"prompt": "{} lives in", "subject": "Ada", "target": t} for t in ("Lima", "Peru", "a", "b", "c", "d")]
    text = {"fact_new_uns": "Ada lives in Lima.", "unsfact_triplets_GPT": triplets}
    full = {**rewrite("{} lives in", "Ada", "Lima", "Rome"), "prompt_full": "Where does Ada live?", **text}
    found = load_facts(
        saved(
            tmp_path,
            [
                akew(full, paraphrase_prompts=["And Ada?", "Ada?"], neighborhood_prompts=["Bo lives in"]),
                akew([{**SPORT, **text, "fact_true_uns": "Old."}], loc="who sang", loc_ans="Ana"),
                akew({**SPORT, **text, "question": "Which sport, then?", "subject": None, "prompt": "Sport of Dudley"}),
            ],
        )
    )
    first, second, third = found.facts
    assert load_records(tmp_path / "data.json").records == (first, second), "most have a subject"
    structured = load_records(saved(tmp_path, [akew(full, neighborhood_prompts=["Bo lives in"])]), "counterfact")
    assert structured.records[0].request == EditRequest("Ada lives in", "Ada", "Lima", "Rome")
    assert structured.records[0].neighbours == (("Bo lives in", "Rome"),)
    assert found.protocol == "unstructured"
    assert first.request == EditRequest("Where does Ada live?", "Ada", "Ada lives in Lima.", None)
    assert first.paraphrases == ("And Ada?", "Ada?")
    asked = groups(first)["sub_questions"]
    assert (len(asked), asked[0]) == (5, Probe("Ada lives in", ("Lima",)))
    assert second.request.prompt == "Dudley is associated with the sport of?"
    assert (second.request.ground_truth, second.neighbours) == ("Old.", (("who sang", "Ana"),))
    assert (third.request.subject, third.paraphrases) == (None, ("Which sport, then?",))


# ---------------------------------------------------------------- flat benchmarks


HALLU = {
    "topic": "brand", "subject": "Saizeriya", "relation": "country", "object": "Japan",
    "question": "What is the country of Saizeriya?", "output_llama": "It is none", "eval_llama": "0.0",
    "multiple_choices": "['Japan', 'Italy']", "paraphrased_question": "Where is Saizeriya located?",
    "multiple_choice_with_letters": "A. Japan  B. Italy", "multiple_choice_labels": "A",
    "yes_question": "Is Japan the country of Saizeriya?", "no_question": "Is Saizeriya no country?",
    "locality_question": "What cuisine is Saizeriya known for?",
    "reversed_relation_question": "Which chain is in Japan?", "question_2hop": "Its capital?", "answer_2hop": "Tokyo",
    "question_3hop": "Its people?", "answer_3hop": "14 million", "question_4hop": "", "answer_4hop": "",
}  # fmt: skip


def test_hallueditbench_is_a_table(tmp_path: Path) -> None:
    rows = [
        HALLU,
        {**HALLU, "question": "Whose is Saizeriya?", "object": "1967", "answer_2hop": ""},
        {**HALLU, "object": ""},
    ]
    path = tmp_path / "brand.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(HALLU))
        writer.writeheader()
        writer.writerows(rows)
    found = load_records(path)
    first, second = found.records
    assert first.request == EditRequest(HALLU["question"], "Saizeriya", "Japan", None)
    assert first.paraphrases == ("Where is Saizeriya located?",)
    assert (first.neighbours, first.unanswered) == ((), ("What cuisine is Saizeriya known for?",))
    asked = groups(first)
    assert list(asked) == ["yes", "no", "multiple_choice", "reversed_relation", "2hop", "3hop"]
    choice = "What is the country of Saizeriya? A. Japan  B. Italy"
    assert asked["multiple_choice"] == [Probe(choice, ("A",))]
    assert asked["reversed_relation"][0].answers == ("Saizeriya",)
    assert second.request.target_new == "1967"
    assert "2hop" not in groups(second)
    assert [number for number, _ in found.skipped] == [4]
    assert found.dropped == ((3, "2hop: 'Its capital?' has no answer."),)
    assert load_records(saved(tmp_path, [{**HALLU, "multiple_choice_with_letters": None}])).records[0].unanswered


def test_ultraeditbench(tmp_path: Path) -> None:
    item = {"case_id": 0, "prompt": "Who wrote Emma?", "rephrase_prompt": "Emma is by whom?", "ans": "Ada",
            "subject": "Emma", "loc": "Who sang?", "loc_ans": "Ana"}  # fmt: skip
    odd = [
        {**item, "prompt": "Who wrote it?", "rephrase_prompt": ["a", "b"], "ans": 7},
        {**item, "prompt": "Emma?", "loc": "", "rephrase_prompt": None},
        {**item, "prompt": "Who is Emma?", "loc_ans": ""},
        {**item, "prompt": "Emma is?", "ans": ""},
    ]
    found = load_facts(saved(tmp_path, [item, *odd]))
    first, second, third, fourth = found.facts
    assert first.request == EditRequest("Who wrote Emma?", "Emma", "Ada", None)
    assert (first.paraphrases, first.neighbours) == (("Emma is by whom?",), (("Who sang?", "Ana"),))
    assert (second.request.target_new, second.paraphrases) == ("7", ("a", "b"))
    assert (third.neighbours, fourth.neighbours) == ((), ())
    assert [number for number, _ in found.skipped] == [4]


def test_ultraeditbench_without_its_subject_in_the_prompt_can_be_edited_without_one(tmp_path: Path) -> None:
    items = [
        {"prompt": "Who?", "rephrase_prompt": "So, who?", "ans": "Ada", "subject": "Emma", "loc": "x", "loc_ans": "y"}
    ]
    assert read(tmp_path, items).records[0].request.subject is None


def test_cknowedit(tmp_path: Path) -> None:
    item = {
        "prompt": "请解释如下成语：守株待兔", "target_old": "等待兔子", "target_new": "比喻不劳而获",
        "portability": [{"prompt": "守株待兔出自哪里？", "answer": "《韩非子》"}],
        "locality": [{"prompt": "画蛇添足是什么意思？", "answer": "多此一举"}],
        "rephrase": ["守株待兔是什么意思？", "成语守株待兔的含义"],
    }  # fmt: skip
    odd = [
        {**item, "prompt": "请解释“之”中的意思。仅需给出该字意思即可，无需解释全文。",
         "portability": None, "locality": [], "rephrase": None},
        {"prompt": "为什么天是蓝的", "target_old": "x", "target_new": "y", "portability_prompt": ["a", "b"],
         "portability_answer": ["c", "d"], "locality_prompt": None, "locality_answer": None, "rephrase": []},
        {**item, "prompt": "请给下面的字注音：", "locality": [{"prompt": ["p1", "p2"], "answer": ["a1", "a2"]}]},
        {**item, "prompt": "五", "target_new": ""},
    ]  # fmt: skip
    found = load_records(saved(tmp_path, [item, *odd]))
    first, second, third, fourth = found.records
    assert found.protocol == "token_accuracy"
    assert first.request == EditRequest(item["prompt"], "守株待兔", "比喻不劳而获", "等待兔子")
    assert first.paraphrases == tuple(item["rephrase"])
    assert first.neighbours == (("画蛇添足是什么意思？", "多此一举"),)
    assert groups(first) == {"portability": [Probe("守株待兔出自哪里？", ("《韩非子》",))]}
    assert second.request.subject == "“之”"
    assert (second.paraphrases, second.neighbours, second.portability) == ((), (), ())
    assert third.request.subject == third.request.prompt
    assert groups(third) == {"portability": [Probe("a", ("c",)), Probe("b", ("d",))]}
    assert fourth.neighbours == (("p1", "a1"), ("p2", "a2"))
    assert fourth.request.subject == "请给下面的字注音："
    assert [number for number, _ in found.skipped] == [4]


def test_a_layout_that_is_half_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"RippleEdits \(edit, example_type\)"):
        load_records(saved(tmp_path, [{"edit": {}}]))
