"""Time and peak memory of each stage of a compilation."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .passes.mapped import give_back


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        name: what was done.
        seconds: wall time.
        peak_bytes: largest resident memory of the process during the stage (Linux), or since its start (elsewhere);
            pages of mapped files that were read are part of it, though the kernel takes those back where it needs them.
    """

    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Stages:
    """Collects the stages in order."""

    done: list[Stage] = field(default_factory=list)

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Time what happens inside; memory that the stages before freed is given back first."""
        give_back()
        _reset_peak()
        began = time.perf_counter()
        yield
        self.done.append(Stage(name, time.perf_counter() - began, _peak_bytes()))


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
