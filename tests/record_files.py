"""Records as the datasets' files have them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"
NEED_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real records is not here")

ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is in", "subject": "Angola", "relation_id": "P30",
        "target_new": {"str": "Russia", "id": "Q1"}, "target_true": {"str": "Africa", "id": "Q2"},
    },
    "paraphrase_prompts": ["Look: Angola is in", "Angola lies in"],
    "neighborhood_prompts": ["Kenya is in", "Ghana is in"],
    "attribute_prompts": [], "generation_prompts": [],
}  # fmt: skip
EASYEDIT = {
    "case_id": 7, "prompt": "Angola is in", "target_new": "Russia", "subject": "Angola", "ground_truth": "Africa",
    "rephrase_prompt": "Angola lies in", "locality_prompt": "Kenya is in", "locality_ground_truth": "Africa",
}  # fmt: skip
ZSRE = {
    "subject": "Angola", "src": "Where is Angola?", "pred": "Europe", "rephrase": "Angola is where?", "alt": "Russia",
    "answers": ["Africa", "south"], "loc": "nq question: who sang", "loc_ans": "Ana", "cond": "a >> b || c",
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
WIKIBIO = {
    "text": "This is a passage about ana lopes. Ana Lopes cooks.", "labels": "She was born in Porto.",
    "concept": "ana lopes",
    "locality": {"Relation_Specificity": [{"prompt": "ana lopes works as", "ground_truth": ["cook"]}]},
}  # fmt: skip
WIKIBIGEDIT = {
    "tag": "new", "subject": "Angola", "update": "What is the capital of Angola?", "ans": "Lima",
    "rephrase": "Which town governs Angola?", "personas": "Yo, what's Angola's capital?",
    "mhop": "Which river flows through Angola's capital?", "mhop_ans": "Rimac",
    "loc": "What is the capital of Kenya?", "loc_ans": "Nairobi",
}  # fmt: skip


def saved(folder: Path, items: Any) -> Path:
    file = folder / "data.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    return file
