"""Records as the datasets' files have them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record_layouts import LAYOUTS

SHARED = Path(__file__).parents[2] / "shared" / "data"
NEED_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real records is not here")

ROME = {**LAYOUTS["counterfact"], "attribute_prompts": [], "generation_prompts": []}
EASYEDIT = {"case_id": 7, **{name: value for name, value in LAYOUTS["columns"].items() if name != "portability"}}
ZSRE = {
    **{name: value for name, value in LAYOUTS["zsre"].items() if name != "portability"},
    "pred": "Europe", "cond": "a >> b || c",
}  # fmt: skip
# KnowEdit's parts, each in the form in which it writes answers: texts, answers with aliases, alternatives.
WIKI_COUNTERFACT = {
    "subject": "Angola", "prompt": "The capital of Angola is", "target_new": "Lima", "ground_truth": "Luanda",
    "portability": {"Subject_Aliasing": [{"prompt": "The capital of Ngola is", "ground_truth": "Lima"}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "The continent of Angola is", "ground_truth": "Africa"}],
        "Forgetfulness": [{"prompt": "The capital of Angola, which is not Lima, is", "ground_truth": "Luanda"}],
    },
}  # fmt: skip
WIKI_RECENT = {
    "subject": "Ana Lopes", "prompt": "Ana Lopes lives in", "target_new": "Porto",
    "portability": {
        "Logical_Generalization": [{"prompt": "Does Ana Lopes live?", "ground_truth": [["yes"], ["right", "yes"]]}],
        "Reasoning": [
            {"prompt": "The country where Ana Lopes lives is", "ground_truth": [["Portugal", "PT"]]},
            {"prompt": "The river where Ana Lopes lives is", "ground_truth": [["Douro"]]},
        ],
    },
    "locality": {"Relation_Specificity": [{"prompt": "Ana Lopes works as", "ground_truth": [["cook", "chef"]]}]},
}  # fmt: skip
KNOWEDIT_ZSRE = {
    "subject": "Angola", "target_new": "Lima", "prompt": "What is the capital of Angola?", "ground_truth": ["Luanda"],
    "rephrase_prompt": "Which town is Angola's capital?", "cond": "a >> b || c",
    "locality": {"Relation_Specificity": [{"prompt": "Angola's continent is", "ground_truth": ["Africa", "south"]}]},
    "portability": {"Reasoning": [{"prompt": "Which river flows through Angola's capital?", "ground_truth": "Rimac"}]},
}  # fmt: skip
WIKIBIO = LAYOUTS["wikibio"]
WIKIBIGEDIT = {"tag": "new", **LAYOUTS["wikibigedit"]}


def saved(folder: Path, items: Any) -> Path:
    file = folder / "data.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    return file
