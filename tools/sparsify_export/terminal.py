"""The screen: what is printed where, and the bar that long work shows."""

from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .passes.errors import InputError

terminal = Terminal(stderr=False)
errors = Terminal(stderr=True, soft_wrap=True, highlight=False, markup=False)


class ProgressBar:
    """A progress bar on stderr that follows ``(stage, done, total)``; silent when ``quiet``."""

    def __init__(self, quiet: bool) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
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
