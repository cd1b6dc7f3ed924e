"""Targets that are found once and given to every batch of every method ("z ready")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparison import tiny_hparams

from easyedit_moe.comparison import ready
from easyedit_moe.comparison.compare import compare
from easyedit_moe.comparison.saved import earlier_rows, save_rows
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors.global_ import GlobalEditor
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.errors import DataError
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.targets.search import TargetSearch, compute_targets

NAMES = ("Global", "MoTE", "MoEEdit-BCD")


def settings(folder: Path, names: tuple[str, ...] = NAMES, **changes: Any) -> list[Any]:
    return [hyperparams_class(name).from_dict(tiny_hparams(folder, name, **changes)) for name in names]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each search of targets was for."""
    counts: list[int] = []
    original = TargetSearch.find

    def find(self: TargetSearch, requests: Any, receive: Any = None) -> Any:
        counts.append(len(requests))
        return original(self, requests, receive)

    monkeypatch.setattr(TargetSearch, "find", find)
    return counts


def test_one_search_at_the_unedited_weights_serves_every_batch(
    task: Task, tmp_path: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hparams = settings(tmp_path)
    requests = [record.request for record in task.records]
    wanted = compute_targets(
        MoELayerView(task.model), task.tok, requests, *GlobalEditor(hparams[0]).target_settings(), False, warn=False
    )
    searches.clear()
    given = []
    original = SolvingEditor.edit_batch

    def edit_batch(self: Any, model: Any, tok: Any, facts: Any, memory: Any, targets: Any) -> Any:
        given.append(targets.delta)
        return original(self, model, tok, facts, memory, targets)

    monkeypatch.setattr(SolvingEditor, "edit_batch", edit_batch)
    result = compare(task, hparams, progress=False, ready_targets=True)
    assert searches == [4], "all records at once, for all methods"
    assert len(given) == 6
    for number in range(0, 6, 2):
        assert torch.equal(torch.cat(given[number : number + 2]), wanted.delta)
    assert len({row.seconds["targets"] for row in result.rows[1:]}) == 1
    assert result.provenance[ready.READY] is True
    assert {row.targets_reached for row in result.rows[1:]} == {int(wanted.reached.sum())}


def test_other_target_settings_get_targets_of_their_own(task: Task, tmp_path: Path, searches: list[int]) -> None:
    hparams = [*settings(tmp_path, ("Global",)), *settings(tmp_path, ("MoTE",), v_lr=0.3)]
    unke = {name: value for name, value in tiny_hparams(tmp_path, "UnKE").items() if name[:4] not in ("mom2", "stat")}
    hparams.append(hyperparams_class("UnKE").from_dict({**unke, "layers": [2], "preserve_n_samples": 0}))
    compare(task, hparams, progress=False, ready_targets=True)
    assert searches == [4, 4, 4]
    searches.clear()
    compare(task, hparams[:1], progress=False)
    assert searches == [2, 2]


def test_kept_targets_are_read_again(task: Task, tmp_path: Path, searches: list[int]) -> None:
    hparams = settings(tmp_path, ("Global",), target_cache_dir=str(tmp_path / "targets"))
    first = compare(task, hparams, progress=False, ready_targets=True)
    again = compare(task, hparams, progress=False, ready_targets=True)
    assert searches == [4]
    assert again.rows[1].scores == first.rows[1].scores


def test_rows_of_both_kinds_are_never_mixed(task: Task, tmp_path: Path) -> None:
    save_rows(compare(task, [], progress=False, ready_targets=True), tmp_path / "ready")
    save_rows(compare(task, [], progress=False), tmp_path / "own")
    as_ready = {**task.provenance, ready.READY: True}
    assert len(earlier_rows(tmp_path / "ready", as_ready, [])) == 1
    with pytest.raises(DataError, match="ready_targets: True there, None now"):
        earlier_rows(tmp_path / "ready", task.provenance, [])
    with pytest.raises(DataError, match="ready_targets: None there, True now"):
        earlier_rows(tmp_path / "own", as_ready, [])
