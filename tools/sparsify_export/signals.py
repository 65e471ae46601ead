"""What happens to a command that is told to stop: it ends as after Ctrl-C, and what it had begun is cleared away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    Attributes:
        number: of the signal; a shell shows 128 more as the exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, a signal that asks to stop raises; one that whoever started us had ignored (nohup) stays ignored.

    Outside the main thread, where Python sets no handlers, this does nothing.
    """
    with _handlers(_stop, {number: signal.getsignal(number) for number in STOPPING}):
        yield


@contextmanager
def unstopped() -> Iterator[None]:
    """Inside, those signals come too late: moving what is finished, or clearing up, is short and done whole."""
    held = {number: signal.getsignal(number) for number in STOPPING}
    with _handlers(lambda number, frame: None, held):
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def _handlers(handler: Any, held: dict[int, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    changed = {number: old for number, old in held.items() if old is not signal.SIG_IGN and old is not None}
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in changed.items():
            signal.signal(number, old)
