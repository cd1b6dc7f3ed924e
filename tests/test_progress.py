from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from easyedit_moe import progress
from easyedit_moe.progress import library_bars, progress_bar

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: bool, delay: float = 0.02) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY", delay)
    with progress_bar(3, "a stage", "step", shown) as bar:
        for _ in range(3):
            time.sleep(0.06)
            bar.update()
    return stream.getvalue()


def test_a_long_stage_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a stage" in drawn(monkeypatch, Terminal(), shown=True)


@pytest.mark.parametrize(
    ("stream", "shown", "delay"), [(io.StringIO(), True, 0.02), (Terminal(), False, 0.02), (Terminal(), True, 2.0)]
)
def test_no_bar_in_a_file_nor_unasked_nor_for_a_short_stage(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: bool, delay: float
) -> None:
    assert drawn(monkeypatch, stream, shown, delay).strip() == ""


def test_bars_appear_after_two_seconds() -> None:
    assert progress.DELAY == 2.0


@pytest.mark.parametrize(
    ("stream", "shown", "bars"), [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)]
)
def test_bars_of_transformers_obey_too(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: bool, bars: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        with library_bars(shown):
            assert transformers_logging.is_progress_bar_enabled() == bars
        assert transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        with library_bars(True):
            assert not transformers_logging.is_progress_bar_enabled()
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


def test_there_is_one_place_for_bars() -> None:
    users = [path.name for path in (ROOT / "easyedit_moe").rglob("*.py") if "tqdm(" in path.read_text(encoding="utf-8")]
    assert users == ["progress.py"]
