"""What every command shares: progress bars, results as tables or JSON, errors as one sentence.

Standard output carries the result alone (with `--json`: one JSON document, also for an error);
bars, warnings and errors go to standard error. Knows nothing of what the commands do.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from reelrt.errors import InputError, ReelError
from reelrt.stopping import stopped_code

# (code, when): shown by `reelrt --help` and in docs/cli.md; the classes of reelrt.errors carry them.
EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "an error of no other kind"),
    (2, "a wrong option, prompt, size or file name"),
    (3, "the model folder cannot be exported, or its export disagrees with it"),
    (4, "a bundle or engine set is missing, incomplete or damaged"),
    (5, "the engines were built for another device or backend version"),
    (6, "a backend is not installed, or failed"),
    (7, "the disk is full, or the system refused a file"),
    (8, "an evaluation is below its minimum, or an INT8 bundle lacks a good quality report"),
    (9, "the plan does not fit the target's memory"),
    (10, "a bundle cannot be calibrated"),
    (11, "the service cannot take the request, or does not know the job"),
    (130, "interrupted; nothing is left half-written"),
)
INPUT_CODE, SYSTEM_CODE, BELOW_MINIMUM_CODE, INTERRUPTED_CODE = 2, 7, 8, 130
EPILOG = "Exit codes: " + "; ".join(f"{code} {when}" for code, when in EXIT_CODES) + "."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Solver = Literal["ddim", "euler", "dpmpp_2m", "unipc", "deis"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_STATUS = {"ok": "green", "warn": "yellow", "missing": "red"}

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def command(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Give a command the common way to warn and to fail.

    The command takes `as_json` and `debug`. Any error ends the process with one sentence on
    standard error and its exit code; `debug` adds the traceback, and other libraries' warnings.
    """

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        as_json, debug = bool(options.get("as_json")), bool(options.get("debug"))
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=UserWarning, module=r"reelrt\.")
            warnings.showwarning = lambda message, *_: note(f"Warning: {message}")
            logging.getLogger("reelrt").addHandler(log := _Log(logging.INFO))
            logging.getLogger("reelrt").setLevel(logging.INFO)
            try:
                return function(*args, **options)
            except typer.Exit:  # with a code of the command's own
                raise
            except SystemExit as error:
                if not stopped_code():
                    raise
                _fail(error, as_json, debug)  # SIGTERM; what `--json` prints is a document then, too
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the last resort)
                if debug:
                    traceback.print_exc()
                _fail(error, as_json, debug)
            finally:
                logging.getLogger("reelrt").removeHandler(log)

    return wrapper


class _Log(logging.Handler):
    """What ReelRT logs, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = "Warning: " if record.levelno >= logging.WARNING else ""
        note(f"{warning}{record.getMessage()}")


def run(app: typer.Typer) -> NoReturn:
    """Run the command line and end the process; wrong words on it are errors like any other.

    With standard output or error closed, what would go there is dropped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (to the end)
    try:
        code = app(prog_name="reelrt", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of typer's about the words
            raise
        words = getattr(getattr(error, "ctx", None), "command_path", "reelrt")
        message = " ".join(error.format_message().split()).rstrip(".")
        usage = InputError(f"{message}.", f"See `{words} --help`.")
        if not message:  # no command was named: typer has shown the help
            sys.exit(INPUT_CODE)
        _fail(usage, "--json" in sys.argv, debug=False)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, as_json: bool, debug: bool) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # `reelrt ... | head` is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    message, remedy, code = _describe(error)
    if code == 1 and not debug and not isinstance(error, ReelError):
        remedy = "Run again with --debug to see where."
    if as_json:
        kind = type(error).__name__
        with suppress(OSError):  # standard output may be what failed
            show({"error": {"type": kind, "message": message, "remedy": remedy, "exit_code": code}}, as_json)
    with suppress(OSError):  # the terminal may have been closed
        errors.print(f"[bold red]Error:[/] {escape(f'{message} {remedy}'.strip())}")
    sys.exit(code)


def _describe(error: BaseException) -> tuple[str, str, int]:
    """Message, remedy and exit code of any exception."""
    if isinstance(error, KeyboardInterrupt) or stopped_code():
        return "interrupted; nothing is left half-written.", "", stopped_code() or INTERRUPTED_CODE
    if isinstance(error, ReelError):
        system = error.exit_code == INPUT_CODE and isinstance(error.__cause__, OSError)
        return error.message, error.remedy, SYSTEM_CODE if system else error.exit_code
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)  # a copy names both
    # safetensors and ONNX Runtime report a full disk as errors of their own.
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return f"the disk is full{f' (writing {name})' if name else ''}.", "Free some space.", SYSTEM_CODE
    if isinstance(error, OSError) and error.strerror:
        return f"{f'{name}: ' if name else ''}{error.strerror}.", "", SYSTEM_CODE
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}.", "", 1


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `WxH`.

    Raises:
        InputError: It does not read so.
    """
    if text is None:
        return None
    width, cross, height = text.lower().replace("\u00d7", "x").partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise InputError(f"size {text!r} is not WIDTHxHEIGHT.", "Write 64x64, say.")
    return int(width), int(height)


def note(text: str) -> None:
    """A line on standard error."""
    errors.print(escape(text))


def show(data: Mapping[str, Any], as_json: bool) -> None:
    """Write a result to standard output: one JSON document, or tables for people.

    For people, a name's ending tells the unit: `weight_bytes`, `build_seconds`.

    Args:
        data: Plain structure of mappings, sequences and scalars.
        as_json: Which of the two.
    """
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()
    else:
        # In a pipe nothing is broken over lines.
        Console(highlight=False, width=None if sys.stdout.isatty() else 1000).print(_render(data))


def _render(data: Mapping[str, Any]) -> RenderableType:
    """Scalars as two columns, mappings and sequences of alike mappings as tables below them."""
    plain = Table.grid(padding=(0, 2))
    parts: list[RenderableType] = [plain]
    for name, value in data.items():
        rows = _rows(value)
        if rows is not None:
            parts += [f"[bold]{_title(name)}[/]", Padding.indent(_table(rows), 2)]
        elif isinstance(value, Mapping) and value:
            inner = {f"{key}_seconds": each for key, each in value.items()} if name == "seconds" else value
            parts += [f"[bold]{_title(name)}[/]", Padding.indent(_render(inner), 2)]
        else:
            plain.add_row(_title(name), escape(_text(name, value)))
    return Group(*[part for part in parts if part is not plain or plain.row_count])


def _rows(value: Any) -> list[Mapping[str, Any]] | None:
    """The rows of what is best shown as a table, each with its name first."""
    if isinstance(value, Mapping) and value and all(isinstance(each, Mapping) for each in value.values()):
        return [{"": key, **each} for key, each in value.items()]
    if isinstance(value, Sequence) and value and all(isinstance(each, Mapping) for each in value):
        return list(value)
    return None


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(_title(name) for name in names), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        texts = [_text(name, row.get(name)) for name in names]
        table.add_row(*(Text(text, _STATUS.get(text, "")) for text in texts))
    return table


def _title(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int | float):
        return f"{value / 2**20:,.1f} MiB"
    if name.endswith("seconds") and isinstance(value, int | float):
        return f"{value:.2f} s"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(key, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(name, each) for each in value)
    return str(value)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars with the time left on standard error, one per `what`; lines where it is no terminal.

    Yields:
        A `reelrt.progress.Progress`.
    """
    if not errors.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield bar


def _lines() -> Callable[[str, int, int], None]:
    """A `Progress` for logs: one line when a thing is done, with its seconds."""
    began: dict[str, float] = {}

    def line(what: str, done: int, total: int) -> None:
        start = began.setdefault(what, time.monotonic())
        if done >= total:
            note(f"{what}: {time.monotonic() - start:.1f} s")

    return line
