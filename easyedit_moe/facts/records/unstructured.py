"""Unstructured edits, whose target is a text: UnKEBench (Deng et al. 2024) and AKEW (Wu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.records.record import Parsed, grouped_record, probe, request_of, texts
from easyedit_moe.facts.subjects import mentions


def parse_unkebench(item: Mapping[str, Any]) -> Parsed:
    """question, para_question, answer; sub_question and sub_answer ask for single facts of the answer.

    There is no subject: edit by a method that needs none, such as UnKE with ``fact_token: last``.
    """
    request = request_of(item["question"], item.get("subject"), item["answer"], None)
    questions, answers = texts(item.get("sub_question")), item.get("sub_answer") or []
    if isinstance(answers, str):
        answers = [answers]
    if len(questions) != len(answers):
        raise RequestError(f"{len(questions)} sub-questions, but {len(answers)} answers.")
    subs = [probe(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return grouped_record(request, texts(item.get("para_question")), {}, {"sub_questions": subs})


def parse_akew(item: Mapping[str, Any]) -> Parsed:
    """requested_rewrite (of a list the first) with fact_new_uns, the text to learn, and its unsfact_triplets_GPT.

    The question is prompt_full (CounterFact) or the filled prompt with a question mark (MQuAKE-CF, WikiUpdate), as the
    benchmark asks it. The triplets, of which the benchmark takes five, are portability prompts "sub_questions".
    """
    rewrite = item["requested_rewrite"]
    if isinstance(rewrite, Sequence) and not isinstance(rewrite, str) and rewrite:
        rewrite = rewrite[0]
    if not isinstance(rewrite, Mapping):
        raise RequestError(f"'requested_rewrite' must be a dict; found {rewrite!r}.")
    subject = rewrite.get("subject")
    question = rewrite.get("prompt_full") or str(rewrite["prompt"]).replace("{}", str(subject or "")) + "?"
    named = subject if isinstance(subject, str) and mentions(question, subject) else None
    request = request_of(question, named, rewrite["fact_new_uns"], rewrite.get("fact_true_uns"))
    again = texts(item.get("paraphrase_prompts")) or texts(rewrite.get("question"))
    subs = [
        probe(str(one.get("prompt")).replace("{}", str(one.get("subject"))), one.get("target"))
        for one in (rewrite.get("unsfact_triplets_GPT") or [])[:SUB_QUESTIONS]
    ]
    near = [probe(item["loc"], item.get("loc_ans"))] if item.get("loc") else []
    return grouped_record(request, again, {"locality": near}, {"sub_questions": subs})


SUB_QUESTIONS = 5


def is_akew(item: Mapping[str, Any]) -> bool:
    """Whether this record has a text to learn."""
    rewrite = item.get("requested_rewrite")
    if isinstance(rewrite, Sequence) and not isinstance(rewrite, str):
        rewrite = next(iter(rewrite), None)
    return isinstance(rewrite, Mapping) and "fact_new_uns" in rewrite
