"""Tasks of general ability for lm-evaluation-harness, made of what lies on this machine, so that they need no network.

    python examples/general_ability_tasks.py --model smollm2-moe --facts counterfact.json --count 100 --out tasks
    easyedit-moe evaluate --model smollm2-moe --patch P --tasks prose,last_word,other_facts --tasks-dir tasks

writes a folder of three tasks: ``prose``, the perplexity of Python's help topics; ``last_word``, the last word of each
of their paragraphs, as LAMBADA (arXiv 1606.06031) asks it; and ``other_facts``, which of two answers to a fact of
CounterFact is likelier, the true one or the one that an edit would write: give it records that are not edited. The
prose is what ``examples/carve_moe.py`` held out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import AutoTokenizer

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.tokens import encode_text

LENGTH, HELD_OUT, LEAST_WORDS = 160, 8, 12
"""Tokens of a chunk and every how manieth is held out, as when carving; fewest words of a paragraph that is asked."""

ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def help_topics() -> list[str]:
    """Python's help topics, by name."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def prose(tok: Any, texts: int) -> list[str]:
    """Chunks of Python's help topics that carving with so many texts held out."""
    ids = encode_text(tok, "\n\n".join(help_topics()))
    chunks = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    return [tok.decode(ids) for ids in chunks[:: max(1, len(chunks) * 2 // max(texts, 1))][::HELD_OUT]]


def last_words(texts: Sequence[str]) -> list[dict[str, str]]:
    """Paragraphs that end a sentence, without their last word, and that word."""
    found = []
    for paragraph in (part for text in texts for part in re.split(r"\n\s*\n", text)):
        words = paragraph.split()
        match = re.fullmatch(r"(.+) ([A-Za-z]+)\.", " ".join(words))
        if match and len(words) >= LEAST_WORDS:
            found.append({"context": match[1], "word": match[2]})
    return found


def other_facts(path: str, skip: int, count: int) -> list[dict[str, Any]]:
    """Prompts of records with their true and their new answer; the true one comes first in every second.

    Raises:
        DataError: no record has both answers.
    """
    requests = [record.request for record in load_records(path).records[skip : skip + count]]
    both = [one for one in requests if one.ground_truth]
    if not both:
        raise DataError(f"No record from {skip} to {skip + count} of {path} has a true answer beside the new one.")
    return [
        {
            "prompt": one.prompt,
            "choices": [one.target_new, one.ground_truth] if number % 2 else [one.ground_truth, one.target_new],
            "answer": number % 2,
        }
        for number, one in enumerate(both)
    ]


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    """A task: its rows and its YAML file."""
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    text = yaml.safe_dump({**about, "test_split": "test", **settings}, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_tasks(model: str, facts: str, skip: int, count: int, chunks: int, texts: int, out: Path) -> dict[str, int]:
    """The three tasks in a folder; how many rows each has."""
    asked = other_facts(facts, skip, count)
    tok = AutoTokenizer.from_pretrained(model)
    held = prose(tok, texts)[:chunks]
    words = last_words(help_topics())
    words = words[:: max(1, len(words) // chunks)][:chunks]
    out.mkdir(parents=True, exist_ok=True)
    write_task(
        out, "prose", [{"text": text} for text in held], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", should_decontaminate=False,
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    write_task(
        out, "last_word", words, output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target=" {{word}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, *ACCURACY],
    )  # fmt: skip
    write_task(
        out, "other_facts", asked, output_type="multiple_choice", doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}", doc_to_target="answer", metric_list=ACCURACY,
    )  # fmt: skip
    return {"prose": len(held), "last_word": len(words), "other_facts": len(asked)}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name whose tokenizer cuts the text in chunks")
    parser.add_argument("--facts", required=True, help="CounterFact, of which records are asked that are not edited")
    parser.add_argument("--skip", type=int, default=0, help="records to leave out at the start")
    parser.add_argument("--count", type=int, default=100, help="records to ask")
    parser.add_argument("--chunks", type=int, default=100, help="chunks of prose, and paragraphs, at most")
    parser.add_argument("--texts", type=int, default=192, help="texts that the model was carved with")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the tasks")
    given = parser.parse_args(argv)
    rows = write_tasks(given.model, given.facts, given.skip, given.count, given.chunks, given.texts, given.out)
    Console().print("Written:", given.out, ", ".join(f"{name} ({count} rows)" for name, count in rows.items()))


if __name__ == "__main__":
    main()
