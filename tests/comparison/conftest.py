from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer
from tiny_comparison import METHODS, tiny_hparams, tiny_records

from easyedit_moe.comparison.task import Task
from easyedit_moe.facts.records import parse_records


@pytest.fixture
def task(tmp_path: Path) -> Task:
    found = parse_records(tiny_records())
    provenance = {"model": "tiny", "edits": 4, "batch_size": 2, "protocol": "counterfact"}
    return Task(tiny_model(), tiny_tokenizer(), found.records, found.protocol, 2, provenance)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model, a data file and a folder of hparams, as a user would have them."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "data.json").write_text(json.dumps(tiny_records()), encoding="utf-8")
    for method in METHODS:
        (tmp_path / "hparams" / method).mkdir(parents=True)
        (tmp_path / "hparams" / method / "tiny.yaml").write_text(yaml.safe_dump(tiny_hparams(tmp_path, method)))
    return tmp_path
