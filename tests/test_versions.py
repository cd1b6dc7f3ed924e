"""The benchmark that sets another version beside this one: medians of pairs, and figures of the work itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import one_version, versions

pytestmark = pytest.mark.usefixtures("no_editing_warnings")


def test_medians_and_ratios_within_pairs() -> None:
    before = [{"prepare": 9.0, "solve": 4.0}, {"prepare": 1.0, "solve": 6.0}, {"prepare": 1.0, "solve": 50.0}]
    after = [{"prepare": 3.0, "solve": 2.0}, {"prepare": 1.0, "solve": 1.0}, {"prepare": 1.0, "solve": 10.0}]
    cold, solve = versions.compared(before, after, cold=True)
    assert (cold["before's"], cold["this one's"], cold["before / this"]) == (9.0, 3.0, 3.0), "of the first pair alone"
    assert (solve["before's"], solve["this one's"], solve["before / this"]) == (6.0, 2.0, 5.0)
    assert [row["figure"] for row in versions.compared(before, after)] == ["solve"]


@pytest.mark.parametrize(("method", "remember"), [("MoTE", True), ("Global", False)])
def test_figures_of_a_small_model(method: str, remember: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 8}
    monkeypatch.setattr(one_version, "CONFIG", one_version.CONFIG | small | {"num_experts_per_tok": 2})
    monkeypatch.setattr(one_version, "TEXTS", 6)
    monkeypatch.setattr(one_version, "RANKS", {"rank_expert": 8, "rank_out": 8, "rank_in": 8})
    row = one_version.row(method, remember, edits=4, batch=2, single=2, folder=tmp_path)
    assert all(value > 0 for value in row.values())
    assert row["first batch"] + row["last batch"] == pytest.approx(row["batches, z ready"])
    assert row["resident after the last"] > 2**20


def test_the_script_needs_nothing_but_the_package_on_the_path(tmp_path: Path) -> None:
    """So that it runs with a version whose benchmarks are others."""
    script = Path(one_version.__file__).read_text(encoding="utf-8")
    package = Path(__file__).parents[1] / "easyedit_moe"
    (tmp_path / "easyedit_moe").symlink_to(package)
    command = [sys.executable, "-c", script, "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_facts_differ() -> None:
    assert len({fact.prompt for fact in one_version.facts(1100)}) == 1100
