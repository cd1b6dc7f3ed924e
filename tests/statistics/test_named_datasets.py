"""Which revision of a dataset would be read: the hub's, or what was prepared of it here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from easyedit_moe.errors import HubError
from easyedit_moe.statistics import named_datasets
from easyedit_moe.statistics.corpus import load_texts
from easyedit_moe.statistics.named_datasets import NamedDataset, dataset_revision, named_dataset

TEXTS = NamedDataset("someone/texts", None)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """A hub that answers each question for a dataset so; the datasets that it was asked for."""
    asked: list[str] = []

    class Client:
        def dataset_info(self, path: str, timeout: float) -> Any:
            asked.append(path)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(sha=answer)

    monkeypatch.setattr(named_datasets, "HfApi", Client)
    monkeypatch.setattr(named_datasets, "why_unreachable", lambda: None)
    return asked


def error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)  # of whichever client the hub's uses
    return kind("refused", response=response)


def test_names_and_their_short_forms() -> None:
    assert named_dataset("wikipedia").place == ("wikimedia/wikipedia", "20231101.en", "train")
    assert named_dataset("someone/texts") == TEXTS
    assert TEXTS.place == ("someone/texts", "", "train")


def test_the_hub_says_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, "abc")
    assert dataset_revision(named_dataset("wikitext")) == "abc"
    assert asked == ["Salesforce/wikitext"]


def test_a_dataset_that_it_does_not_know_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, error(RepositoryNotFoundError, 404))
    assert dataset_revision(TEXTS) is None


@pytest.mark.parametrize("answer", [error(HfHubHTTPError, 503), TimeoutError("late"), RuntimeError("reset")])
def test_a_hub_that_fails_is_no_answer(answer: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, answer)
    with pytest.raises(HubError, match=f"someone/texts: {type(answer).__name__}: "):
        dataset_revision(TEXTS)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_hub_that_is_switched_off_is_not_asked(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, "abc")
    monkeypatch.setattr(named_datasets, "why_unreachable", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1" if variable == "HF_DATASETS_OFFLINE" else "0")
    with pytest.raises(HubError, match=rf"revision of the dataset someone/texts: {variable} is set\."):
        dataset_revision(TEXTS)
    assert asked == []


def prepared(folder: Path, revision: str, texts: list[str]) -> None:
    """A dataset as ``datasets`` leaves it in its cache after it was loaded whole."""
    datasets = pytest.importorskip("datasets")
    from datasets.arrow_writer import ArrowWriter

    place = folder / "someone___texts" / "default" / "0.0.0" / revision
    place.mkdir(parents=True)
    data = datasets.Dataset.from_dict({"text": texts})
    with ArrowWriter(path=str(place / "texts-train.arrow"), features=data.features) as writer:
        for row in data:
            writer.write(row)
        count, size = writer.finalize()
    info = data.info.copy()
    info.config_name, info.dataset_name, info.builder_name, info.version = "default", "texts", "parquet", "0.0.0"
    info.splits = datasets.SplitDict(dataset_name="texts")
    info.splits.add(datasets.SplitInfo("train", num_bytes=size, num_examples=count, dataset_name="texts"))
    info.write_to_directory(str(place))


def test_without_the_hub_it_is_that_of_what_was_prepared_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    prepared(tmp_path, "abc123", ["a one", "b two"])
    assert dataset_revision(TEXTS) == "abc123"
    assert load_texts("someone/texts") == ["a one", "b two"], "which is what is read"
    with pytest.raises(HubError, match="someone/others"):
        dataset_revision(NamedDataset("someone/others", None))
