"""Tables fit a terminal and are whole in a file."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from easyedit_moe.commands.printing import output, show_table

ROOT = Path(__file__).parents[2]
NAMES = [f"column {i}" for i in range(12)]
LONG = "a long text of many words " * 5


def table(rows: int = 3, title: str | None = None, style: box.Box | None = box.SIMPLE_HEAD) -> Table:
    made = Table(box=style, title=title)
    made.add_column("method")
    for name in NAMES:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("note")
    for row in range(rows):
        made.add_row(f"method-{row}", *(f"{row}.{i:03d}" for i in range(12)), LONG.strip())
    return made


def shown(made: Table, width: int, terminal: bool) -> list[str]:
    file = io.StringIO()
    show_table(made, Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("style", [box.SIMPLE_HEAD, box.HEAVY_HEAD])
@pytest.mark.parametrize("width", [40, 80, 100])
def test_on_a_terminal_nothing_is_wider_and_nothing_is_lost(width: int, style: box.Box) -> None:
    lines = shown(table(title="What it is " * 20, style=style), width, terminal=True)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for name in NAMES:
        assert name in text
    for row in range(3):
        for i in range(12):
            (line,) = [line for line in lines if f" {row}.{i:03d} " in line]
            assert f"method-{row}" in line, "each part says which method a number is of"
    assert text.count("many") == 3 * 5


def test_what_fits_is_one_table() -> None:
    small = Table("a", "b")
    small.add_row("1", "2")
    assert len([line for line in shown(small, 80, terminal=True) if "a" in line]) == 1


def test_in_a_file_every_row_is_one_line() -> None:
    lines = shown(table(title="What it is " * 20), 80, terminal=False)
    assert len([line for line in lines if line.strip()]) == 1 + 1 + 1 + 3  # title, header, rule, rows
    for row in range(3):
        (line,) = [line for line in lines if f"method-{row}" in line]
        assert all(f" {row}.{i:03d} " in line for i in range(12))
        assert LONG.strip() in line


def test_pipe_has_no_codes_and_no_cuts() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "easyedit_moe", "methods", "--show", "MoTE/factworld"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert "['I heard that ', 'The harbour was quiet this morning. ']" in done.stdout


@pytest.mark.parametrize("no_colour", [True, False])
def test_terminal_of_80_columns(no_colour: bool) -> None:
    """A real terminal: COLUMNS says how wide, NO_COLOR that there are to be no codes at all."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm-256color"}
    env |= {"NO_COLOR": "1"} if no_colour else {}
    if not no_colour:
        env.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "easyedit_moe", "methods"]
    with subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                break
            if not chunk:
                break
            text += chunk
    os.close(ours)
    assert process.returncode == 0
    plain = text.decode()
    assert ("\x1b[" in plain) != no_colour
    if no_colour:
        assert max(map(len, plain.splitlines())) <= 80
        assert plain.count("qwen3.6-35b-a3b") >= 14


def test_no_color_must_not_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert output().color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert output().color_system is None
