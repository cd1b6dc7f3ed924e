from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easyedit_moe.errors import DataError
from easyedit_moe.statistics import corpus
from easyedit_moe.statistics.corpus import corpus_hash, load_texts

TEXTS = ["Angola is in Africa.", "Zoë lives in 東京.", "The fox jumps."]


def write(file: Path, content: str) -> Path:
    file.write_text(content, encoding="utf-8")
    return file


def test_text_file_is_one_text_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.txt", "\n".join([TEXTS[0], "", TEXTS[1], "   ", TEXTS[2], ""]))
    assert load_texts(file) == load_texts(str(file)) == TEXTS
    assert load_texts(write(tmp_path / "corpus", "a\r\nb\r\n")) == ["a", "b"]


@pytest.mark.parametrize("record", [lambda t: t, lambda t: {"text": t, "id": 3}], ids=["strings", "records"])
def test_json_files(record: Any, tmp_path: Path) -> None:
    items = [record(t) for t in TEXTS]
    lines = "\n".join(json.dumps(i, ensure_ascii=False) for i in items)
    assert load_texts(write(tmp_path / "c.jsonl", lines + "\n\n")) == TEXTS
    assert load_texts(write(tmp_path / "c.json", json.dumps(items))) == TEXTS


def test_jsonl_lines_end_only_at_newlines(tmp_path: Path) -> None:
    odd = ["one\u2028still one", "two\x85still two"]
    lines = "\r\n".join(json.dumps(t, ensure_ascii=False) for t in odd)
    file = tmp_path / "c.jsonl"
    file.write_bytes(lines.encode())
    assert load_texts(file) == odd


def test_lists_and_records() -> None:
    assert load_texts(TEXTS) == TEXTS
    assert load_texts([{"text": t} for t in TEXTS]) == TEXTS
    assert load_texts(iter(TEXTS)) == TEXTS
    assert load_texts(["", " ", TEXTS[0]]) == TEXTS[:1]


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "title": ["a", "b", "c"]})
    assert load_texts(data) == TEXTS
    assert load_texts(data.to_iterable_dataset(), 2) == TEXTS[:2]
    with pytest.raises(DataError, match="'text' field"):
        load_texts(datasets.Dataset.from_dict({"title": TEXTS}))


def test_samples_are_cut_after_empty_texts_are_dropped(tmp_path: Path) -> None:
    file = write(tmp_path / "c.txt", "\n\n" + "\n".join(TEXTS))
    assert load_texts(file, 2) == TEXTS[:2]
    assert load_texts(file, 99) == TEXTS
    endless = (f"text {i}" for i in iter(int, 1))
    assert load_texts(endless, 3) == ["text 0"] * 3


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/missing", "folder/missing.jsonl"])
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_texts(name)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.jsonl", '{"text": "a"}\n{"text"', r"can't be read as \.jsonl"),
        ("c.json", "[", r"can't be read as \.json"),
        ("c.json", '{"text": ["a", "b"]}', "must hold a list"),
        ("c.json", '"just one text"', "must hold a list"),
        ("c.json", "5", "must hold a list"),
        ("c.json", '[{"body": "a"}]', "'text' field"),
        ("c.jsonl", '{"text": 5}', "'text' field"),
        ("c.jsonl", "[1]", "'text' field"),
        ("c.txt", " \n\n", "holds no text"),
        ("c.json", "[]", "holds no text"),
    ],
)
def test_wrong_layouts(name: str, content: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        load_texts(write(tmp_path / name, content))


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="can't be read"):
        load_texts(tmp_path / "c.txt")


@pytest.mark.parametrize("source", [{"text": TEXTS}, 5, None])
def test_wrong_sources(source: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        load_texts(source)


def test_empty_sources() -> None:
    with pytest.raises(DataError, match="holds no text"):
        load_texts([])


def test_a_name_without_datasets_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_texts("wikipedia")


def test_a_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'wikipedia' is neither a file, .*ConnectionError: no network"):
        load_texts("wikipedia", 3)
    with pytest.raises(DataError, match="neither a file"):
        load_texts("someone/texts", 3)
    streamed = {"split": "train", "streaming": True}
    assert asked == [(("wikimedia/wikipedia", "20231101.en"), streamed), (("someone/texts", None), streamed)]


def test_a_stream_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def stream(*args: Any, **kwargs: Any) -> Any:
        yield {"text": "a"}
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert load_texts("someone/texts", 1) == ["a"]
    with pytest.raises(DataError, match="ConnectionError: reset"):
        load_texts("someone/texts", 2)


def parquet(file: Path, **columns: Any) -> Path:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files.write_table(arrow.table(columns), file)
    return file


def test_parquet_files(tmp_path: Path) -> None:
    file = parquet(tmp_path / "c.parquet", id=[1, 2, 3, 4], text=[TEXTS[0], None, TEXTS[1], TEXTS[2]])
    assert load_texts(file) == TEXTS
    assert load_texts(file, 2) == TEXTS[:2]
    with pytest.raises(DataError, match="no column 'text'; found body"):
        load_texts(parquet(tmp_path / "d.parquet", body=TEXTS))
    with pytest.raises(DataError, match=r"can't be read as \.parquet"):
        load_texts(write(tmp_path / "e.parquet", "no parquet"))


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        load_texts(write(tmp_path / "c.parquet", ""))


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "a.txt", "no")
    write(tmp_path / "picture.png", "no")
    write(tmp_path / "b" / "z.jsonl", json.dumps({"text": TEXTS[1]}))
    parquet(tmp_path / "c.PARQUET", text=TEXTS[2:])
    write(tmp_path / "a.txt", TEXTS[0])
    assert load_texts(tmp_path) == load_texts(str(tmp_path)) == TEXTS
    assert load_texts(tmp_path, 2) == TEXTS[:2]
    write(tmp_path / "b" / "broken.json", "{")
    assert load_texts(tmp_path, 1) == TEXTS[:1], "no more is read than is taken"
    with pytest.raises(DataError, match=r"broken\.json"):
        load_texts(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no corpus"):
        load_texts(tmp_path / "empty")


def test_generated_needs_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no model here"):
        load_texts("generated")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "generated", "a")
    assert load_texts("./generated") == ["a"]


def test_hash_changes_with_content() -> None:
    assert corpus_hash(TEXTS) == corpus_hash(list(TEXTS))
    others = [TEXTS[:2], TEXTS[::-1], [*TEXTS[:2], TEXTS[2] + "!"], [TEXTS[0] + TEXTS[1], TEXTS[2]], [*TEXTS, ""]]
    assert len({corpus_hash(t) for t in [TEXTS, *others]}) == len(others) + 1


@pytest.mark.parametrize("place", ["file", "folder"])
def test_an_interrupt_while_a_file_is_closed_is_not_lost(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "corpus.txt", "a\nb\n")

    def interrupted(path: Path) -> Iterator[str]:
        try:
            yield from ("a", "b")
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_texts(path if place == "file" else tmp_path, 1)
