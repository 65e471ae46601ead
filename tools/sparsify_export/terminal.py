"""The screen: what is printed where, and the bar that long work shows.

Names of layers, files and tensors come from files that anybody may have written. Nothing printed here is read as
markup or as the name of an emoji, and characters that steer a terminal are shown by their number.
"""

import logging
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .passes.errors import InputError

DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal write from the other side, so that a text looks like another one."""


def visible(text: str) -> str:
    r"""The text with control characters, halves of surrogates and changes of direction as ``\x1b`` or ``\u202e``."""
    return "".join(char if char in "\n\t" or _harmless(char) else ascii(char)[1:-1] for char in text)


def _harmless(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cs") and char not in DIRECTIONS


LOG_WIDTH = 160
"""Columns where nothing is a screen: tables of a log cut to the 80 that are assumed otherwise cannot be read."""


class Terminal(Console):
    """A console that shows every string as it is, in tables too; what rich's own texts and tables hold included."""

    def __init__(self, *, stderr: bool, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, **options)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = LOG_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every plain string."""
        return super().render_str(visible(text), **options)


terminal = Terminal(stderr=False)
errors = Terminal(stderr=True, soft_wrap=True, highlight=False)


class LogFile(logging.FileHandler):
    """Where ``--log-file`` goes."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, warnings and logs of libraries go to the log file, if one was asked for, and not to the screen."""
    root, nowhere = logging.getLogger(), logging.NullHandler()
    root.addHandler(nowhere)  # without any handler, Python prints warnings
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for handler in [nowhere, *(each for each in root.handlers if isinstance(each, LogFile))]:
            root.removeHandler(handler)
            handler.close()


def log_to(file: Path | None) -> None:
    """Append warnings, logs and tracebacks to a file until the command ends.

    Raises:
        InputError: it cannot be written.
    """
    if file is None:
        return
    try:
        handler = LogFile(file, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise InputError(f"--log-file {file} cannot be written: {error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


class ProgressBar:
    """A progress bar on stderr that follows ``(stage, done, total)``; silent when ``quiet``."""

    def __init__(self, quiet: bool) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=errors, transient=True, disable=quiet)
        self._quiet = quiet
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> "ProgressBar":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show a stage; a new one replaces the last."""
        if stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._stage = self._bar.add_task(stage, total=total or None), stage
        self._bar.update(self._task, completed=done, total=total or None)

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        if not self._quiet:
            self._bar.console.print(text)

    def as_console(self) -> Any:
        """The same as what the compiler wants."""
        from .settings import Console  # which imports torch

        return Console(note=self.note, progress=self.progress)


def positive(flag: str, value: int | None, *, least: int = 1) -> None:
    """Refuse a number that is too small; None was not given.

    Raises:
        InputError: it is.
    """
    if value is not None and value < least:
        raise InputError(f"{flag} {value} is too small; want {least} or more")
