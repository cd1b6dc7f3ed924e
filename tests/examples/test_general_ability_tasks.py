"""Tasks of general ability that need no network: what they ask, and that the harness runs them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer
from tiny_comparison import tiny_records

from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.harness import Harness

SCRIPT = Path(__file__).parents[2] / "examples" / "general_ability_tasks.py"
TASKS = ("prose", "last_word", "other_facts")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("general_ability_tasks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(script: ModuleType, tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "facts.json").write_text(json.dumps(tiny_records(4)), encoding="utf-8")
    out = tmp_path / "tasks"
    given = {"--model": tmp_path / "tiny", "--facts": tmp_path / "facts.json", "--skip": 1, "--count": 3}
    given |= {"--chunks": 5, "--out": out}
    script.main([str(part) for pair in given.items() for part in pair])
    return out


def rows(tasks: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_true_answer_is_first_in_every_second_row(tasks: Path) -> None:
    facts = [record["requested_rewrite"] for record in tiny_records(4)][1:]
    found = rows(tasks, "other_facts")
    assert [row["answer"] for row in found] == [0, 1, 0]
    for fact, row in zip(facts, found, strict=True):
        assert row["choices"][row["answer"]] == fact["target_true"]["str"]
        assert row["choices"][1 - row["answer"]] == fact["target_new"]["str"]


def test_last_words_are_of_whole_sentences(script: ModuleType, tasks: Path) -> None:
    text = f"{'word ' * 12}end.\n\nToo short.\n\n{'word ' * 12}no end\n\n{'more ' * 12}last."
    assert [row["word"] for row in script.last_words([text])] == ["end", "last"]
    found = rows(tasks, "last_word")
    assert len(found) == 5
    assert all(row["word"].isalpha() and len(row["context"].split()) > 10 for row in found)
    settings = yaml.safe_load((tasks / "last_word.yaml").read_text(encoding="utf-8"))
    # The harness puts nothing between the two where it is asked for a likelihood alone.
    assert settings["doc_to_text"] + settings["doc_to_target"] == "{{context}} {{word}}"
    assert len(rows(tasks, "prose")) == 5


def test_facts_without_a_true_answer_are_refused(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"prompt": "Ana is in", "subject": "Ana", "target_new": "Rome"}]), encoding="utf-8")
    out = tmp_path / "tasks"
    with pytest.raises(DataError, match="No record from 0 to 5"):
        script.write_tasks("tiny", str(file), 0, 5, 5, 8, out)
    assert not out.exists()


def test_the_harness_runs_them(tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    scores = Harness(TASKS, tasks, progress=False).scores(tiny_model(), tiny_tokenizer())
    assert set(scores) == set(TASKS)
    for name in TASKS:
        (data,) = yaml.safe_load((tasks / f"{name}.yaml").read_text())["dataset_kwargs"]["data_files"].values()
        count = len(Path(data).read_text().splitlines())
        assert {score.count for score in scores[name].values()} == {count}
