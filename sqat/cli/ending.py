"""Every end of the program: an exit code, and at most one line about it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import cast

import typer

from sqat.cli.commands import app
from sqat.errors import SqatError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and turn every end into an exit code and at most one line."""
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's own warnings, once in every process
    code = _run(argv)
    if code and _shares_work():
        _leave(code)
    return code


def _shares_work() -> bool:
    """Whether a launcher started this process together with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _run(argv: Sequence[str] | None) -> int:
    """Run a command and tell of an end that was not wished for; returns the exit code."""
    try:
        code: int = app(args=argv, prog_name="sqat", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        return error.exit_code if isinstance(error, typer.Exit) else _tell(error)
    return _tell(KeyboardInterrupt()) if code == INTERRUPTED else code  # new versions of Typer swallow it


def _leave(code: int) -> None:
    """End one process of a distributed run at once: what torch does at exit waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# UsageError, which old versions of Typer take from click and new ones from a copy of their own.
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def _tell(error: BaseException) -> int:
    """Print one line about an error and return its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM) if _shares_work() else ():
        signal.signal(number, signal.SIG_IGN)  # a launcher ends all processes once one has ended: this one is about to
    from sqat.cli import console

    debug = os.environ.get("SQAT_DEBUG", "") not in ("", "0")
    if debug and not isinstance(error, USAGE_ERROR | KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, SqatError):
        if error.exit_code == INTERRUPTED:
            console.print_failure(str(error))
        else:
            console.print_error(error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        console.print_failure("interrupted; the same command goes on from the last saved state")
        return INTERRUPTED
    if isinstance(error, USAGE_ERROR):
        console.print_error(SqatError(usage_line(error)))
        return 2
    return _tell_fault(error, debug)


def usage_line(error: typer.BadParameter) -> str:
    """A usage error in one line, with where to read more."""
    command = error.ctx.command_path if error.ctx is not None else "sqat"
    return f"{error.format_message().rstrip('.')} (see {command} --help)"


def _tell_fault(error: BaseException, debug: bool) -> int:
    """What nobody foresaw: a path that cannot be written is the user's to mend, all else is this program's fault."""
    from sqat.cli import console

    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.ENOSPC,
        errno.EROFS,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
    ):
        console.print_error(SqatError(error.strerror or "not writable", place=error.filename or ""))
        return 2
    where = f" ({str(error).splitlines()[0]})" if str(error) else ""
    hint = "" if debug else "; run it again with -vv or SQAT_DEBUG=1 for the traceback"
    console.print_failure(f"internal error: {type(error).__name__}{where}{hint}")
    return 1
