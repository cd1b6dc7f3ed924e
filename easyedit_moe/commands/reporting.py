"""How the command line behaves, whatever the command: errors, warnings, logs, and how a command ends.

An error is one line on standard error, without a traceback unless ``-v``: exit code 2 for errors of ours and for wrong
usage, 1 for errors that nobody foresaw, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import typer
from typer.core import TyperGroup

from easyedit_moe.errors import EditingError, EditingWarning

logger = logging.getLogger("easyedit_moe")

USAGE, UNFORESEEN, INTERRUPTED = 2, 1, 130
"""Exit codes: bad input, an error that is not ours, Ctrl-C."""
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])  # of click, which newer typer brings along itself
_ENDS = (_USAGE_ERROR, typer.Exit, typer.Abort)


def is_quiet() -> bool:
    """Whether only results and errors are wanted (``-q``)."""
    return not logger.isEnabledFor(logging.WARNING)


def shows_progress() -> bool:
    """Whether commands ask for progress bars, which appear on a terminal only."""
    return not is_quiet()


@contextmanager
def errors_reported() -> Iterator[None]:
    """Within, an error ends the command as the module says; the traceback is logged where ``-v`` asks for logs."""
    try:
        yield
    except _ENDS:
        raise
    except EditingError as error:
        raise _ended(error, USAGE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader of a pipe has seen enough
            raise
        raise _ended(error, UNFORESEEN) from error


def _ended(error: Exception, code: int) -> typer.Exit:
    logger.info("What led to it:", exc_info=error)
    hint = "" if code == USAGE or logger.isEnabledFor(logging.INFO) else " (run with -v for the traceback)"
    say_error(f"{type(error).__name__}: {error}{hint}")
    return typer.Exit(code)


def say_error(text: str) -> None:
    """One line on standard error, however long the text and whatever its line breaks."""
    from rich.text import Text

    from easyedit_moe.commands.printing import output

    line = Text.assemble(("error:", "bold red"), " ", " ".join(text.split()))
    output(stderr=True).print(line, soft_wrap=True)


@contextmanager
def logged(level: int) -> Iterator[None]:
    """Within, what is logged from ``level`` on, and warnings, go to standard error, a line each; as before after."""
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = root.level, logger.level
    root.addHandler(handler)
    root.setLevel(level)
    logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _log_warning
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        logger.setLevel(levels[1])


def _log_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours are for the user; those of other libraries are told with ``-v``."""
    level = logging.WARNING if issubclass(category, EditingWarning) else logging.INFO
    logger.log(level, "warning: %s", " ".join(str(message).split()))


class Commands(TyperGroup):
    """The group of all commands, with the manners of this module."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, with its logs, warnings and errors as its user wants them."""
        quiet, verbose = ctx.params.get("quiet"), ctx.params.get("verbose")
        level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
        with logged(level), errors_reported():
            return super().invoke(ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As typer's, but wrong usage is one line, too."""
        try:
            ended = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (_USAGE_ERROR, typer.Abort) as error:
            if not standalone_mode:
                raise
            ended = _wrong_usage(error)
        if standalone_mode:
            sys.exit(ended if isinstance(ended, int) else 0)
        return ended


def _wrong_usage(error: Any) -> int:
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return USAGE
    where = getattr(getattr(error, "ctx", None), "command_path", "")
    see = f" See {where} --help." if where else ""
    message = error.format_message().rstrip()
    say_error(message + ("" if message.endswith((".", "?", "!")) else ".") + see)
    return USAGE
