"""The one place that ends the program: every outcome becomes an exit code and at most one line.

0 success, 1 a fault of sqat, 2 a mistake of the user, 3 a missed quality gate, 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import cast

import typer

from sqat.cli.commands import app
from sqat.cli.streams import prepare_streams, show_log
from sqat.errors import SqatError, escape_control

INTERRUPTED = 130
# UsageError: old versions of Typer take it from click, new ones have a copy of their own.
USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
# Errors of the file system that the user can repair.
USER_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ENOENT,
               errno.ENOTDIR, errno.EISDIR)  # fmt: skip

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    signal.signal(signal.SIGTERM, raise_interrupt)
    warnings.simplefilter("ignore")
    prepare_streams()
    show_log(logging.ERROR)
    for name, value in QUIET.items():  # read when the libraries are imported, once per process
        os.environ.setdefault(name, value)
    code = run_app(argv)
    if not code and is_distributed() and "torch" in sys.modules:
        from sqat.distributed import leave_processes

        leave_processes()
    if code and is_distributed():
        # torch's exit handlers would wait for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run_app(argv: Sequence[str] | None) -> int:
    """Run the Typer application and turn every exception into an exit code."""
    try:
        code: int = app(args=argv, prog_name="sqat", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        return error.exit_code if isinstance(error, typer.Exit) else report_error(error)
    # New versions of Typer swallow the interrupt and return its code.
    return report_error(KeyboardInterrupt()) if code == INTERRUPTED else code


def is_distributed() -> bool:
    """Return whether a launcher started this process together with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


def report_error(error: BaseException) -> int:
    """Print one line about an exception and return its exit code."""
    if is_distributed():
        # The launcher ends all ranks as soon as one has ended; this one ends now in any case.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from sqat.cli.printing import print_error, print_failure

    debug = os.environ.get("SQAT_DEBUG", "") not in ("", "0")
    if debug and not isinstance(error, USAGE_ERROR | KeyboardInterrupt):
        for line in "".join(traceback.format_exception(error)).splitlines():
            print(escape_control(line), file=sys.stderr)
    match error:
        case SqatError(exit_code=130):
            print_failure(str(error))
            return INTERRUPTED
        case SqatError():
            print_error(error)
            return error.exit_code
        case KeyboardInterrupt() | typer.Abort():
            print_failure("interrupted; run the same command again to resume from the last saved state")
            return INTERRUPTED
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError() if error.errno in USER_ERRNOS:
            place = error.filename or ""
            print_error(SqatError(error.strerror or "cannot be accessed", place=place, code="unwritable-file"))
            return 2
    if isinstance(error, USAGE_ERROR):
        print_error(SqatError(usage_line(error), code="usage"))
        return 2
    reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
    hint = "" if debug else "; run it again with -vv or SQAT_DEBUG=1 for the traceback"
    print_failure(f"internal error: {type(error).__name__}{reason}{hint}")
    return 1


def usage_line(error: typer.BadParameter) -> str:
    """Put a usage error into one line that names the help page."""
    command = error.ctx.command_path if error.ctx is not None else "sqat"
    return f"{error.format_message().rstrip('.')} (see {command} --help)"
