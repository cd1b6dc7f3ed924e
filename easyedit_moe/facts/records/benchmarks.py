"""Flat benchmarks, a key per prompt: HalluEditBench, UltraEditBench and CKnowEdit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from easyedit_moe.facts.records.record import Parsed, absent, as_text, grouped_record, probe, request_of, texts
from easyedit_moe.facts.subjects import mentions

HOPS = range(2, 7)
_CHINESE = (
    ("请填写下列古诗文的后一句：", ""),
    ("请解释", "中的意思。仅需给出该字意思即可，无需解释全文。"),
    ("请解释如下成语：", ""),
    ("请给下面的字注音：", ""),
    ("请解释如下俗语或谚语：", ""),
)
"""What stands around the subject in CKnowEdit's prompts."""


def parse_hallueditbench(item: Mapping[str, Any]) -> Parsed:
    """HalluEditBench (Huang et al. 2024): question, subject, object and a column per kind of question.

    The edit writes the object, which is true; what the model made up is ``output_<model>``, and not used. Yes, no,
    multiple-choice (with the question in front), reversed and multi-hop questions are portability by group, and
    locality_question must keep the unedited model's answer.
    """
    request = request_of(item["question"], item.get("subject"), item["object"], None)
    choices = " ".join(str(item[name]) for name in ("question", "multiple_choice_with_letters") if item.get(name))
    asked: dict[str, tuple[Any, Any]] = {
        "yes": (item.get("yes_question"), "Yes"),
        "no": (item.get("no_question"), "No"),
        "multiple_choice": (
            choices if not absent(item.get("multiple_choice_with_letters")) else None,
            item.get("multiple_choice_labels"),
        ),
        "reversed_relation": (item.get("reversed_relation_question"), item.get("subject")),
        **{f"{n}hop": (item.get(f"question_{n}hop"), item.get(f"answer_{n}hop")) for n in HOPS},
    }
    groups = {name: probe(as_text(prompt), answer) for name, (prompt, answer) in asked.items() if not absent(prompt)}
    record, reasons = grouped_record(request, texts(item.get("paraphrased_question")), {}, groups)
    return replace(record, unanswered=texts(item.get("locality_question"))), reasons


def parse_ultraeditbench(item: Mapping[str, Any]) -> Parsed:
    """UltraEditBench (Gu et al. 2025): prompt, rephrase_prompt, ans, loc, loc_ans, and mostly subject."""
    prompt, subject = item["prompt"], item.get("subject")
    known = isinstance(subject, str) and isinstance(prompt, str) and mentions(prompt, subject)
    request = request_of(prompt, subject if known else None, item["ans"], item.get("ground_truth"))
    near = [] if absent(item.get("loc")) else [probe(item["loc"], item.get("loc_ans"))]
    return grouped_record(request, texts(item.get("rephrase_prompt")), {"locality": near}, {})


def parse_cknowedit(item: Mapping[str, Any]) -> Parsed:
    """CKnowEdit (Fang et al. 2024), Chinese: prompt, target_old, target_new, and lists portability, locality, rephrase.

    The published file has lists of dicts with prompt and answer; as its description has it, portability_prompt and
    portability_answer (locality likewise) are lists beside each other. The subject is what the prompt's fixed
    instruction leaves, and the whole prompt without one.
    """
    prompt = item["prompt"]
    request = request_of(
        prompt, item.get("subject") or _chinese_subject(prompt), item["target_new"], item["target_old"]
    )
    sections = {name: _pairs(item, name) for name in ("locality", "portability")}
    return grouped_record(
        request,
        texts(item.get("rephrase")),
        {"locality": sections["locality"]},
        {"portability": sections["portability"]},
    )


def _chinese_subject(prompt: Any) -> Any:
    for before, after in _CHINESE:
        if isinstance(prompt, str) and prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)].strip() or prompt
    return prompt


def _pairs(item: Mapping[str, Any], name: str) -> list[Any]:
    given = item.get(name)
    if absent(given):
        prompts, answers = item.get(f"{name}_prompt"), item.get(f"{name}_answer")
        if absent(prompts):
            return []
        return [probe(prompts, answers)]
    listed = [given] if isinstance(given, Mapping) else given
    if not isinstance(listed, list):
        return [listed]
    return [probe(one.get("prompt"), one.get("answer")) if isinstance(one, Mapping) else one for one in listed]
