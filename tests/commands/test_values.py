"""What no command takes, whatever the option: refused in one line, exit code 2, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from easyedit_moe.commands.app import app
from easyedit_moe.commands.values import LARGEST, MOST, fault
from easyedit_moe.errors import LayerError


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e308, LARGEST + 1, -(10**400), "a\0b", "\udcff"]
)
def test_a_fault_is_named(value: object) -> None:
    assert fault(value).endswith(".")
    assert len(fault(value)) < 200


@pytest.mark.parametrize("value", [0, -1, LARGEST, 0.0, -MOST, 1e-320, "", "東京 \U0001f600", None, True])
def test_all_else_is_left_to_the_command(value: object) -> None:
    assert fault(value) == ""


@pytest.mark.parametrize(
    "line",
    [
        "plan --budget nan", "plan --budget inf", "plan --edits -5", "plan --edits 1" + "0" * 30, "plan --budget 1e308",
        "compare --edits -5 --out out", "compare --batch-size 0 --out out", "tune factworld --out out --budget nan",
        "locate --budget nan", "locate --edits -5", "locate --layers 0-99999999999", "locate --samples -1 --estimate",
        "init --model factworld --locate --budget nan", "ask x --temperature nan", "ask x --temperature 1e-320",
        "ask x --device meta", "ask x --device nope", "ask x --model empty", "ask x --patch file",
        "edit facts.csv --out file/out", "edit facts.csv --out out --stats-dir file/stats",
        "edit facts.csv --out out --set batch_size=0", "edit facts.csv --out out --device nope --dry-run",
        "edit deep.json --out out", "edit deep.csv --out out", "evaluate --data deep.json", "methods --show deep.json",
        "plan --hparams twice.yaml", "edit facts.csv --out out --set lambda_reg=2024-99-99", "compare --out file",
        "statistics --stats-dir file/stats", "compare --data deep.json --out out", "locate facts.csv --model empty",
    ],
)  # fmt: skip
def test_bad_lines_end_in_one_line_and_leave_nothing(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    deep = "[" * 100_000
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "deep.json").write_text(deep, encoding="utf-8")
    (tmp_path / "deep.csv").write_text(f'prompt,target_new,portability\na,b,"{deep}"\n', encoding="utf-8")
    (tmp_path / "twice.yaml").write_text("alg_name: MoTE\nalg_name: MoTE\n", encoding="utf-8")
    (tmp_path / "facts.csv").write_text("prompt,subject,target_new\nAngola is in,Angola,Russia\n", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2, done.output
    assert "error:" in done.output
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_layers_are_numbers_of_layers() -> None:
    from easyedit_moe.commands.locate import whole_numbers

    assert whole_numbers("3-5,0") == (0, 3, 4, 5)
    for text in ("0-99999", "²", "1-", "-1", "x"):
        with pytest.raises(LayerError, match="whole numbers such as 3"):
            whole_numbers(text)
