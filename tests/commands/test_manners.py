"""How the command line behaves whatever the command: how it ends, what it says and where."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from easyedit_moe import __version__
from easyedit_moe.commands import methods as methods_module
from easyedit_moe.commands.app import EXAMPLES, app
from easyedit_moe.commands.reporting import Commands, errors_reported, is_quiet, shows_progress
from easyedit_moe.errors import DataError, EditingWarning, HyperParamsError

ROOT = Path(__file__).parents[2]


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "easyedit_moe", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def raising(error: BaseException) -> typer.Typer:
    """A command line with the manners of ours, whose one command raises."""
    bad = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @bad.callback()
    def options(
        verbose: bool = typer.Option(False, "--verbose", "-v"), quiet: bool = typer.Option(False, "--quiet", "-q")
    ) -> None:
        """Of every command."""

    @bad.command()
    def fail() -> None:
        raise error

    return bad


@pytest.mark.parametrize("args", [["--version"], ["-q", "--version"]])
def test_version(args: list[str]) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"easyedit-moe {__version__}\n", "")


def test_module_is_the_command() -> None:
    done = run("methods", "--help")
    assert done.returncode == 0
    assert "easyedit-moe methods" in done.stdout


@pytest.mark.parametrize("command", EXAMPLES, ids=lambda command: command.__name__)
def test_every_command_shows_an_example(command) -> None:
    shown = CliRunner().invoke(app, [command.__name__, "--help"], env={"COLUMNS": "200"}).output
    assert f"Example: easyedit-moe {command.__name__} " in shown


def test_completion_is_offered() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output
    done = run(_EASYEDIT_MOE_COMPLETE="complete_bash", COMP_WORDS="easyedit-moe comp", COMP_CWORD="1")
    assert "compare" in done.stdout.split()


LONG = "lines\nof a message " + "that goes on " * 40


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError(LONG), 2, "error: DataError: lines of a message that goes on "),
        (HyperParamsError("[bold]x[/] is no value"), 2, "error: HyperParamsError: [bold]x[/] is no value"),
        (ValueError("surprise"), 1, "error: ValueError: surprise (run with -v for the traceback)"),
        (KeyError("x"), 1, "error: KeyError: 'x' (run with -v for the traceback)"),
    ],
)
def test_an_error_is_one_line_on_standard_error(error: Exception, code: int, said: str) -> None:
    done = CliRunner().invoke(raising(error), ["fail"])
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(said)


@pytest.mark.parametrize(("error", "code"), [(DataError("no"), 2), (ValueError("no"), 1)])
def test_the_traceback_is_shown_on_request(error: Exception, code: int) -> None:
    done = CliRunner().invoke(raising(error), ["-v", "fail"])
    assert done.exit_code == code
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {type(error).__name__}: no"


def test_interruption_ends_with_130_and_no_traceback() -> None:
    done = CliRunner().invoke(raising(KeyboardInterrupt()), ["fail"])
    assert done.exit_code == 130
    assert "Traceback" not in done.output


def test_exit_codes_of_commands_come_through() -> None:
    assert CliRunner().invoke(raising(typer.Exit(3)), ["fail"]).exit_code == 3


def test_a_command_may_report_errors_itself() -> None:
    with pytest.raises(typer.Exit) as end, errors_reported():
        raise DataError("no")
    assert end.value.exit_code == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["compare", "--edits", "many"], "easyedit-moe compare --help"),
        (["nonsense"], "No such command 'nonsense'"),
        (["compare", "--edit", "3"], "No such option"),
        (["-v", "-q", "methods"], "contradict"),
        (["methods", "--show", "nowhere/model"], "does not exist"),
    ],
)
def test_wrong_usage_is_one_line_with_exit_code_2(args: list[str], said: str) -> None:
    done = run(*args, COLUMNS="40")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("args", "quiet", "shown"), [([], False, ["ours", "logged"]), (["-q"], True, []), (["-v"], False, None)]
)
def test_what_is_said_on_the_way(
    monkeypatch: pytest.MonkeyPatch, args: list[str], quiet: bool, shown: list[str] | None
) -> None:
    seen = []

    def command() -> None:
        seen.append((is_quiet(), shows_progress()))
        warnings.warn("ours\nin one line", EditingWarning, stacklevel=1)
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        logging.getLogger("easyedit_moe.somewhere").warning("logged")
        logging.getLogger("easyedit_moe.somewhere").info("detail")

    monkeypatch.setattr(methods_module, "_list", command)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    done = CliRunner().invoke(app, [*args, "methods"])
    assert done.exit_code == 0
    assert seen == [(quiet, not quiet)]
    wanted = {"ours": "warning: ours in one line", "logged": "logged"}
    everything = ["warning: ours in one line", "warning: of a library", "logged", "detail"]
    assert done.stderr.splitlines() == (everything if shown is None else [wanted[name] for name in shown])
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
