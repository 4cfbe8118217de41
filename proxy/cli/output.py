"""What is written to stdout, and nobody else writes there: text, tables, JSON."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import typer
from rich.console import Console, RenderableType

from proxy.errors import StandfastError

#: What a shell reports of a program that ended because its reader had gone: 128 + SIGPIPE.
EXIT_READER_GONE = 141

#: Wider than any table: what a program reads is neither cut nor folded.
WIDTH_UNBOUNDED = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Surface:
    """What is written on: ``width`` in characters; ``color``: whether it shows colours."""

    width: int = WIDTH_UNBOUNDED
    color: bool = False


def stdout_is_terminal() -> bool:
    """Whether a person looks on."""
    return sys.stdout is not None and sys.stdout.isatty()


def stdout_surface() -> Surface:
    """The surface of stdout. Source: no-color.org for ``NO_COLOR``."""
    if not stdout_is_terminal():
        return Surface()
    color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Surface(shutil.get_terminal_size().columns, color)


def lay_out(content: RenderableType, surface: Surface) -> str:
    """``content`` as lines of text."""
    page = io.StringIO()
    console = Console(
        file=page,
        width=surface.width,
        force_terminal=surface.color,
        color_system="standard" if surface.color else None,
        no_color=not surface.color,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    console.print(content)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def emit(text: str) -> None:
    """Write lines of text, at once.

    Raises:
        Exit: the reader has gone; there is nobody to write to any more.
        StandfastError: it cannot be written.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(EXIT_READER_GONE) from None
    except OSError as error:
        _drop_stdout()
        raise StandfastError(f"the output cannot be written: {error.strerror}") from None


def _drop_stdout() -> None:
    # What is still buffered would be written, and fail, once more at the interpreter's end.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def emit_json(answer: object) -> None:
    """Write an object as JSON, for people to read too."""
    emit(json.dumps(answer, indent=2))


def emit_json_line(answer: object) -> None:
    """Write an object as one line of JSON."""
    emit(json.dumps(answer))


def show(answer: T, view: Callable[[T], RenderableType], *, as_json: bool) -> None:
    """Write an answer of the manager: as it is, or as ``view`` shows it to people."""
    if as_json:
        emit_json(answer)
    else:
        emit(lay_out(view(answer), stdout_surface()))


def done(answer: object, text: str, *, as_json: bool) -> None:
    """Say what an order has done: ``text`` for people, or the manager's answer."""
    if as_json:
        emit_json(answer)
    else:
        emit(text)
