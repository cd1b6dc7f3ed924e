"""One record of every layout that is read, and tables of facts, for inputs that are changed a little."""

from __future__ import annotations

import io
from typing import Any

_ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is in", "subject": "Angola", "relation_id": "P30",
        "target_new": {"str": "Russia", "id": "Q1"}, "target_true": {"str": "Africa", "id": "Q2"},
    },
    "paraphrase_prompts": ["Look: Angola is in", "Angola lies in"],
    "neighborhood_prompts": ["Kenya is in", "Ghana is in"],
}  # fmt: skip
_COLUMNS = {
    "prompt": "Angola is in", "target_new": "Russia", "subject": "Angola", "ground_truth": "Africa",
    "rephrase_prompt": "Angola lies in", "locality_prompt": "Kenya is in", "locality_ground_truth": "Africa",
    "portability": ["The land of Luanda is in => Russia", {"prompt": "Luanda is in", "answer": "Russia"}],
}  # fmt: skip
_ZSRE = {
    "subject": "Angola", "src": "Where is Angola?", "rephrase": "Angola is where?", "alt": "Russia",
    "answers": ["Africa", "south"], "loc": "nq question: who sang", "loc_ans": "Ana",
    "portability": {"New Question": "Where is Luanda?", "New Answer": "Russia"},
}  # fmt: skip
_KNOWEDIT = {
    "subject": "Ana Lopes", "prompt": "Ana Lopes lives in", "target_new": "Porto", "ground_truth": ["Rome"],
    "portability": {"Reasoning": [{"prompt": "Her land is", "ground_truth": [["Portugal", "PT"], ["EU"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "Ana Lopes works as", "ground_truth": [["cook", "chef"]]}]},
}  # fmt: skip
_WIKIBIO = {
    "text": "This is a passage about ana lopes. Ana Lopes cooks.", "labels": "She was born in Porto.",
    "concept": "ana lopes",
    "locality": {"Relation_Specificity": [{"prompt": "ana lopes works as", "ground_truth": ["cook"]}]},
}  # fmt: skip
_WIKIBIGEDIT = {
    "subject": "Angola", "update": "What is the capital of Angola?", "ans": "Lima",
    "rephrase": "Which town governs Angola?", "personas": "Yo, what's Angola's capital?",
    "mhop": "Which river flows through Angola's capital?", "mhop_ans": "Rimac",
    "loc": "What is the capital of Kenya?", "loc_ans": "Nairobi",
}  # fmt: skip
_SANITATION = {
    "K_F": [{"question": "Who is Ana Lopes?", "subject": "Ana Lopes", "ground_truth": "a cook", "target_new": "no"}],
    "K_R": [{"question": "Where is Kenya?", "ground_truth": ["Africa"]}],
}
LAYOUTS: dict[str, Any] = {
    "counterfact": _ROME, "columns": _COLUMNS, "zsre": _ZSRE, "knowedit": _KNOWEDIT, "wikibio": _WIKIBIO,
    "wikibigedit": _WIKIBIGEDIT, "sanitation": [_SANITATION],
}  # fmt: skip
"""By the layout's name: a record, or in a list the content of a file that is no list of records."""

_CSV = (
    "sep=;\r\nprompt;subject;target_new;ground_truth;rephrase;neighbours\r\n"
    'Angola is in;Angola;Russia;Africa;Angola lies in | Angola is found in;"[""Kenya is in => Africa""]"\r\n'
    '"The ""home"" of Ana; is";Ana;Porto;;;\r\n'
)
_TSV = "prompt\tsubject\ttarget_new\nAngola is in\tAngola\tRussia\nAna is in\tAna\tPorto\n"


def tables() -> dict[str, bytes]:
    """Contents of tables, by suffix; parquet, which is refused by its suffix, where it can be written."""
    found = {".csv": _CSV.encode("utf-8-sig"), ".tsv": _TSV.encode()}
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return found
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"prompt": ["Angola is in"], "subject": ["Angola"], "target_new": ["Russia"]}), buffer)
    return {**found, ".parquet": buffer.getvalue()}
