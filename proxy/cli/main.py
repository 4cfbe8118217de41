"""The entry point, and the boundary: whatever goes wrong is one line on stderr and an exit status."""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxy.cli.text import printable
from proxy.errors import StandfastError

if TYPE_CHECKING:
    from typer import TyperException

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

#: Set to anything, it shows the traceback of what should never happen.
DEBUG_VARIABLE = "STANDFAST_DEBUG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line, by default the process's own; its exit status. Raises nothing."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _fail(error)


def _run(arguments: Sequence[str]) -> int:
    # Imported here, so that ^C while they load meets the boundary too.
    from typer import TyperException

    from proxy.cli.app import app

    for argument in arguments:
        if any(0xD800 <= ord(one) <= 0xDFFF for one in argument):
            _complain(f"argument {argument!r} is not UTF-8")
            return EXIT_USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal has no character for is shown as an escape rather than not at all.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(args=list(arguments), prog_name="standfast", standalone_mode=False)
    except TyperException as error:
        return _fail_usage(error)
    return status if isinstance(status, int) else 0


def _fail_usage(error: "TyperException") -> int:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "standfast"
    _complain(f"{message[:1].lower()}{message[1:]}; see: {command} --help")
    return error.exit_code


def _fail(error: BaseException) -> int:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    if isinstance(error, StandfastError):
        _complain(str(error))
    else:
        _complain(f"failed inside ({type(error).__name__}: {error}); with {DEBUG_VARIABLE}=1 it says where")
    return EXIT_FAILED


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(f"standfast: {printable(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
