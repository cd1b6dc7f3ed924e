"""What was found of a corpus is kept: no text is read where its statistics are cached, none after a change believed."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, flipped_byte, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easyedit_moe.errors import (
    CorpusNotComparedWarning,
    CoverageWarning,
    DataError,
    EditingWarning,
    HubError,
    WriteError,
)
from easyedit_moe.facts import tokens as fact_tokens
from easyedit_moe.hparams import GlobalHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import corpus as corpora
from easyedit_moe.statistics import gather, known_corpus
from easyedit_moe.statistics.corpus import Origin, origin_of
from easyedit_moe.statistics.known_corpus import CorpusBounds, KnownCorpus
from easyedit_moe.statistics.moments import LayerMoments
from easyedit_moe.statistics.token_cache import rules_hash, tokenizer_hash

MANY = TEXTS * 3
FAST = tiny_tokenizer()


class Corpus:
    """Statistics of a file of texts, and what was read, tokenised and hashed in the last call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.stats = folder, folder / "stats"
        self.read: list[Any] = []
        self.tokenised: list[str] = []
        self.hashed: list[int] = []
        self.model = tiny_model()
        text, encode, hashing = corpora._text, fact_tokens._encode_with_spans, known_corpus.corpus_hash
        monkeypatch.setattr(corpora, "_text", lambda item, name: self.read.append(item) or text(item, name))
        monkeypatch.setattr(
            fact_tokens, "_encode_with_spans", lambda tok, text: self.tokenised.append(text) or encode(tok, text)
        )
        monkeypatch.setattr(known_corpus, "corpus_hash", lambda texts: self.hashed.append(len(texts)) or hashing(texts))
        self.source = str(self.write("corpus.txt", MANY))

    def write(self, name: str, texts: list[str]) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("\n".join(texts), encoding="utf-8")
        return path

    def __call__(self, tok: Any = FAST, fresh: bool = False, **changes: Any) -> LayerMoments:
        values = {
            "alg_name": "Global", "model_name": "tiny", "layers": [1], "mom2_dataset": self.source,
            "stats_dir": str(self.stats), "coverage_target": None,
        }  # fmt: skip
        for seen in (self.read, self.tokenised, self.hashed):
            seen.clear()
        view = MoELayerView(self.model)
        statistics = gather.fresh_statistics if fresh else gather.layer_statistics
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            hparams = GlobalHyperParams.from_dict(values | changes)
            return statistics(view, tok, hparams, [1], model_fingerprint(view), progress=False)[1]

    def records(self) -> list[Path]:
        return sorted((self.stats / "corpora").iterdir())

    def nothing_was_read(self) -> bool:
        return not self.read and not self.hashed and not set(self.tokenised) & {*MANY, *NAMES}

    def anew(self, tok: Any = FAST, **changes: Any) -> LayerMoments:
        """As a call where nothing is cached."""
        return self(tok, stats_dir=str(self.folder / "empty" / str(len(list(self.folder.rglob("*"))))), **changes)


NAMES = ["Zoë Łukasz", "Ana from Angola"]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(tmp_path, monkeypatch)


def same(one: LayerMoments, other: LayerMoments) -> bool:
    return one.num_tokens == other.num_tokens and torch.equal(one.keys, other.keys)


# ---------------------------------------------------------------- hits


@pytest.mark.parametrize(
    "changes",
    [{}, {"mom2_n_tokens": 40}, {"mom2_n_samples": 9}, {"mom2_n_tokens": 40, "max_length": 5}],
    ids=["all", "budget", "samples", "cut"],
)
def test_nothing_is_read_where_the_statistics_are_cached(changes: dict[str, Any], corpus: Corpus) -> None:
    first = corpus(**changes)
    assert corpus.read, "the counter counts"
    again = corpus(**changes)
    assert corpus.nothing_was_read()
    assert same(first, again)


@pytest.mark.parametrize("source", ["folder", "factworld"])
def test_folders_and_the_bundled_corpus_are_not_read_either(source: str, corpus: Corpus) -> None:
    if source == "folder":
        corpus.write("folder/a.txt", MANY)
        corpus.write("folder/deep/b.md", TEXTS)
    name = str(corpus.folder / source) if source == "folder" else source
    first = corpus(mom2_dataset=name, mom2_n_samples=30)
    again = corpus(mom2_dataset=name, mom2_n_samples=30)
    assert corpus.nothing_was_read()
    assert same(first, again)


def test_protected_texts_are_not_read_either(corpus: Corpus) -> None:
    protected = {"protected_dataset": str(corpus.write("names.txt", NAMES))}
    first = corpus(**protected)
    assert set(NAMES) <= set(corpus.tokenised)
    again = corpus(**protected)
    assert corpus.nothing_was_read()
    assert same(first, again)


@pytest.mark.parametrize("changes", [{}, {"mom2_n_tokens": 40}], ids=["all", "budget"])
def test_fresh_statistics_read_the_texts_once_and_hash_nothing(changes: dict[str, Any], corpus: Corpus) -> None:
    changes = changes | {"protected_dataset": str(corpus.write("names.txt", NAMES))}
    first = corpus(**changes)
    count = len(corpus.read)
    fresh = corpus(fresh=True, **changes)
    assert corpus.hashed == []
    assert 0 < len(corpus.read) <= count
    assert not set(corpus.tokenised) & {*MANY, *NAMES}, "their tokens are kept, too"
    assert same(first, fresh)


def test_layers_that_are_missing_read_the_texts_and_hash_nothing(corpus: Corpus) -> None:
    corpus()
    corpus.model = tiny_model(seed=3)
    found = corpus()
    assert corpus.hashed == []
    assert len(corpus.read) == len(MANY)
    assert same(found, corpus.anew())


# ---------------------------------------------------------------- changes


def edit_with_another_time(corpus: Corpus) -> None:
    state = os.stat(corpus.source)
    corpus.write("corpus.txt", [text.replace("Paris", "Rome!") for text in MANY])
    os.utime(corpus.source, ns=(state.st_atime_ns, state.st_mtime_ns + 10**6))
    assert os.stat(corpus.source).st_size == state.st_size


def edit_with_the_time_put_back(corpus: Corpus) -> None:
    state = os.stat(corpus.source)
    corpus.write("corpus.txt", [text.replace("Paris", "Rome!") for text in MANY])
    while os.stat(corpus.source).st_ctime_ns == state.st_ctime_ns:  # a file system's clock may tick slowly
        os.utime(corpus.source)
    os.utime(corpus.source, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced_by_another_file(corpus: Corpus) -> None:
    other = corpus.write("other.txt", [text.replace("Paris", "Rome!") for text in MANY])
    os.replace(other, corpus.source)


def linked_elsewhere(corpus: Corpus) -> None:
    other = corpus.write("other.txt", MANY[:-2])
    os.unlink(corpus.source)
    os.symlink(other, corpus.source)


@pytest.mark.parametrize(
    "change", [edit_with_another_time, edit_with_the_time_put_back, replaced_by_another_file, linked_elsewhere]
)
@pytest.mark.parametrize("bounds", [{}, {"mom2_n_tokens": 10**6}], ids=["all", "budget"])
def test_a_file_that_changed_is_read_anew(change: Callable[[Corpus], None], bounds: Any, corpus: Corpus) -> None:
    before = corpus(**bounds)
    count = len(corpus.records())
    change(corpus)
    found = corpus(**bounds)
    assert corpus.read
    assert not same(found, before)
    assert same(found, corpus.anew(**bounds))
    assert len(corpus.records()) == count + 1, "the corpus's record took the old one's place"
    corpus(**bounds)
    assert corpus.nothing_was_read()


@pytest.mark.parametrize("change", ["added", "removed", "edited", "renamed"])
def test_a_folder_that_changed_is_read_anew(change: str, corpus: Corpus) -> None:
    for name, texts in (("a.txt", TEXTS), ("deep/b.md", MANY), ("c.txt", TEXTS[:1])):
        corpus.write(f"folder/{name}", texts)
    folder = corpus.folder / "folder"
    corpus.source = str(folder)
    before = corpus()
    if change == "added":
        corpus.write("folder/deep/d.txt", TEXTS[:3])
    elif change == "removed":
        (folder / "c.txt").unlink()
    elif change == "edited":
        corpus.write("folder/deep/b.md", MANY[1:])
    else:
        (folder / "a.txt").rename(folder / "a.bin")
    found = corpus()
    assert corpus.read
    assert not same(found, before)
    assert same(found, corpus.anew())


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"mom2_n_samples": 9}, 9),
        ({"mom2_n_tokens": 30}, None),
        ({"mom2_n_tokens": 60, "mom2_n_samples": 2}, 2),
        ({"mom2_n_tokens": 60, "max_length": 3}, None),
    ],
    ids=["samples", "budget", "samples of a budget", "cut"],
)
def test_other_bounds_have_records_of_their_own(changes: dict[str, Any], read: int | None, corpus: Corpus) -> None:
    first = corpus(mom2_n_tokens=60)
    found = corpus(**changes)
    assert corpus.read
    assert read is None or corpus.hashed[0] == read
    assert not same(found, first)
    assert same(found, corpus.anew(**changes))
    assert same(corpus(mom2_n_tokens=60), first)
    assert corpus.nothing_was_read()


@pytest.mark.parametrize("bounds", [{}, {"mom2_n_tokens": 60}], ids=["all", "budget"])
def test_another_tokenizer_is_noticed_and_remembered(bounds: dict[str, Any], corpus: Corpus) -> None:
    corpus(**bounds)
    other = tiny_tokenizer("bos")
    found = corpus(other, **bounds)
    assert set(corpus.tokenised) & set(MANY)
    assert same(found, corpus.anew(other, **bounds))
    for tok in (other, FAST):
        corpus(tok, **bounds)
        assert corpus.nothing_was_read()


def test_a_corpus_that_changes_while_it_is_read_has_no_record(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    load = known_corpus.load_texts

    def interfering(source: Any, n_samples: int | None = None) -> list[str]:
        texts = load(source, n_samples)
        corpus.write("corpus.txt", MANY[1:])
        return texts

    monkeypatch.setattr(known_corpus, "load_texts", interfering)
    old = corpus()
    monkeypatch.setattr(known_corpus, "load_texts", load)
    assert not any(path.name.startswith("texts") for path in corpus.records())
    found = corpus()
    assert not same(found, old)
    assert same(found, corpus.anew())


@pytest.mark.parametrize("changed", [True, False])
def test_texts_that_are_read_again_are_those_that_were_found(changed: bool, corpus: Corpus) -> None:
    bounds = CorpusBounds(100, None, 512)
    KnownCorpus(FAST, corpus.source, bounds, corpus.stats)
    known = KnownCorpus(FAST, corpus.source, bounds, corpus.stats)
    corpus.write("corpus.txt", MANY[1:] if changed else MANY)
    if not changed:
        assert known.texts() == MANY
        return
    with pytest.raises(DataError, match=r"holds other texts than when it was found.*Start again"):
        known.texts()


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("kind", ["texts", "tokens"])
@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"", flipped_byte, lambda b: b"[1]", lambda b: b"{}"])
def test_a_damaged_record_is_made_anew(kind: str, damage: Callable[[bytes], bytes], corpus: Corpus) -> None:
    first = corpus(mom2_n_tokens=40)
    (path,) = (path for path in corpus.records() if path.name.startswith(kind))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(EditingWarning, match=rf"{path.name} .*made anew now"):
        again = corpus(mom2_n_tokens=40)
    assert same(first, again)
    assert path.read_bytes() == whole
    corpus(mom2_n_tokens=40)
    assert corpus.nothing_was_read()


def test_a_folder_that_takes_no_record_is_no_obstacle(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus()
    for path in corpus.records():
        path.unlink()

    def refuse(path: Path, value: Any) -> None:
        raise WriteError("read-only")

    monkeypatch.setattr(known_corpus, "write_checked_json", refuse)
    assert same(corpus(), first)
    assert corpus.read
    assert corpus.records() == []
    assert same(corpus(), first)
    assert corpus.hashed == [8], "this process knows the texts; what the tokenizer makes of the first few is cheap"


def test_several_at_once_write_one_record(corpus: Corpus) -> None:
    found: list[tuple[str, str, int]] = []
    start = threading.Barrier(6)

    def find() -> None:
        start.wait()
        known = KnownCorpus(tiny_tokenizer(), corpus.source, CorpusBounds(100, 50, 7), corpus.stats)
        found.append((known.name, known.tokens, known.count))

    threads = [threading.Thread(target=find) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert [path.name.split("-")[0] for path in corpus.records()] == ["texts", "tokens"]
    corpus.read.clear()
    KnownCorpus(FAST, corpus.source, CorpusBounds(100, 50, 7), corpus.stats)
    assert corpus.read == []


def test_processes_that_found_different_texts_are_refused(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "least_over_processes", lambda value: min(value, 12345))
    with pytest.raises(DataError, match="processes of this run found different texts"):
        corpus()


# ---------------------------------------------------------------- tokenizers


def test_rules_are_those_of_the_tokens_alone() -> None:
    tok = tiny_tokenizer()
    before = rules_hash(tok)
    tok(TEXTS[:2], padding="max_length", truncation=True, max_length=7)
    assert tok.backend_tokenizer.padding is not None
    assert rules_hash(tok) == before == rules_hash(tiny_tokenizer())
    assert rules_hash(tiny_tokenizer("bos")) != before
    tok.add_special_tokens({"additional_special_tokens": ["<fact>"]})
    assert rules_hash(tok) != before


def test_a_tokenizer_with_rules_in_python_is_tried_on_the_first_texts(corpus: Corpus) -> None:
    class Own(type(FAST)):
        """Of a module of its own, as the code that comes with a checkpoint."""

    tok = tiny_tokenizer()
    tok.__class__ = Own
    assert rules_hash(tok) is None
    assert tokenizer_hash(tok, "")
    first = corpus(tok)
    assert same(corpus(tok), first)
    assert corpus.read == MANY[:8]
    assert corpus.hashed == [8], "of what it makes of them"
    corpus(tok, mom2_n_tokens=40)
    corpus(tok, mom2_n_tokens=40)
    assert corpus.tokenised, "how far a budget goes is not known without it"


def test_a_tokenizer_without_a_word_for_the_probe_is_tried_on_the_texts(corpus: Corpus) -> None:
    words = sorted({word for text in MANY for word in text.split()})
    level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=level)
    assert rules_hash(tok) is None
    first = corpus(tok)
    assert first.num_tokens == sum(len(text.split()) for text in MANY)
    assert same(corpus(tok), first)


def test_a_folder_may_have_a_name_that_is_no_text(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(corpus.folder) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError as error:
        pytest.skip(f"this file system wants names in UTF-8: {error}")
    monkeypatch.chdir(os.fsdecode(folder))
    Path("c.txt").write_text("\n".join(MANY), encoding="utf-8")
    corpus.source = "c.txt"
    first = corpus()
    assert same(corpus(), first)
    assert corpus.nothing_was_read()


# ---------------------------------------------------------------- datasets by name


class Hub:
    """A dataset by name of which the hub, if it answers, has a revision; no network is asked."""

    def __init__(self, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.datasets = pytest.importorskip("datasets")
        self.corpus, self.texts, self.loads = corpus, MANY, 0
        self.revision: str | None = "one"
        self.away = self.breaks = False
        corpus.source = "wikipedia"
        monkeypatch.setattr(corpora, "dataset_revision", self._revision)
        monkeypatch.setattr(self.datasets, "load_dataset", self._load)

    def _revision(self, dataset: Any) -> str | None:
        assert dataset.place == ("wikimedia/wikipedia", "20231101.en", "train")
        if self.away:
            raise HubError("The hub can't be asked.")
        return self.revision

    def _load(self, path: str, config: str, split: str, streaming: bool) -> Any:
        self.loads += 1
        if self.breaks:
            raise ConnectionError("no network")
        return self.datasets.Dataset.from_dict({"text": self.texts}).to_iterable_dataset()


@pytest.fixture
def hub(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(corpus, monkeypatch)


@pytest.mark.parametrize("bounds", [{}, {"mom2_n_tokens": 40}], ids=["all", "budget"])
def test_a_dataset_is_streamed_once_per_revision(bounds: dict[str, Any], hub: Hub, corpus: Corpus) -> None:
    first = corpus(**bounds)
    assert hub.loads == 1
    assert same(corpus(**bounds), first)
    assert corpus.nothing_was_read()
    assert hub.loads == 1
    hub.texts, hub.revision = MANY[::-1], "two"
    second = corpus(**bounds)
    assert hub.loads == 2
    assert not same(second, first)
    assert same(corpus(**bounds), second)
    assert hub.loads == 2


def test_a_hub_that_is_away_is_not_waited_for(hub: Hub, corpus: Corpus) -> None:
    first = corpus()
    hub.away = hub.breaks = True
    with pytest.warns(CorpusNotComparedWarning, match=r"can't be asked\. .*revision one is used for 'wikipedia'"):
        again = corpus()
    assert same(first, again)
    assert corpus.nothing_was_read()
    assert hub.loads == 1
    with pytest.warns(CorpusNotComparedWarning), pytest.raises(DataError, match="ConnectionError: no network"):
        corpus(fresh=True)
    with pytest.raises(DataError, match="ConnectionError: no network"):
        corpus(mom2_n_samples=5)


@pytest.mark.parametrize("changed", [True, False])
def test_texts_of_a_dataset_that_was_not_compared_are(changed: bool, hub: Hub, corpus: Corpus) -> None:
    """The hub says no revision, but the dataset can be read: then its texts must be those of the record."""
    first = corpus()
    hub.away, hub.texts = True, MANY[1:] + MANY[:1] if changed else MANY
    if changed:
        with pytest.warns(CorpusNotComparedWarning), pytest.raises(DataError, match="holds other texts"):
            corpus(fresh=True)
        return
    with pytest.warns(CorpusNotComparedWarning):
        again = corpus(fresh=True)
    assert same(again, first)


def test_rows_of_another_revision_than_the_hub_says_are_not_taken_for_it(hub: Hub, corpus: Corpus) -> None:
    """``datasets`` may fall back on an older copy, although the hub was asked and answered."""
    corpus()
    hub.texts = MANY[1:] + MANY[:1]
    with pytest.raises(DataError, match="holds other texts"):
        corpus(fresh=True)


def test_without_a_record_a_hub_that_is_away_is_the_datasets_matter(hub: Hub, corpus: Corpus) -> None:
    hub.away = True
    first = corpus()
    assert not any(path.name.startswith("texts") for path in corpus.records()), "nothing says which revision it is"
    hub.away = False
    assert same(corpus(), first)
    assert hub.loads == 2


def test_a_dataset_that_the_hub_does_not_know_is_read_each_time(hub: Hub, corpus: Corpus) -> None:
    first = corpus()
    hub.revision = None
    assert same(corpus(), first)
    assert corpus.hashed[0] == len(MANY)
    hub.texts = MANY[::-1]
    assert not same(corpus(), first)


def test_what_is_found_needs_no_datasets(hub: Hub, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert same(corpus(), first)


def test_files_are_found_by_the_name_that_they_are_read_by(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.folder)
    assert origin_of("corpus.txt") == origin_of(corpus.source)
    os.symlink(corpus.source, "corpus.md")
    assert origin_of("corpus.md") != origin_of("corpus.txt")
    assert origin_of("nowhere.txt") is None
    assert origin_of("generated") is None
    (corpus.folder / "hollow").mkdir()
    assert origin_of(str(corpus.folder / "hollow")) is None
    os.symlink(corpus.folder / "gone", corpus.folder / "hollow" / "gone.txt")
    assert origin_of(str(corpus.folder / "hollow")) is None
    assert isinstance(origin_of("factworld"), Origin)
