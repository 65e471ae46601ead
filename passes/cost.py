"""Whether a sparse op would be slower than the dense one, predicted from figures measured once on a machine.

    seconds = overhead + out_features * in_features * (empty + density * (full - empty))

``empty`` and ``full`` are what one place of the weight costs when nothing and when everything is kept. They are known
for a few token counts: between two of them the time is interpolated, above the last it grows in proportion. Weights
come from memory, as they do in a model that is larger than the caches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..calibrate.patterns import NM, Pattern
from .dialect.packed import op_name
from .dialect.storage import Storage

TOKENS = (1, 16, 256)
"""The token counts that are measured: decoding, a small batch, prefill."""

DENSE = "MatMul"
"""The name of the dense float32 op among the formats."""

Worth: TypeAlias = Callable[[Pattern, int, int, int], str]
"""Pattern, out_features, in_features and non-zeros of a weight to the reason to leave it dense, "" to lower it."""


@dataclass(frozen=True)
class Speed:
    """How fast one op is in one format.

    Attributes:
        overhead: seconds of an op without work.
        empty: seconds for a place that is not kept, one figure for each of ``TOKENS``.
        full: seconds for a place that is kept, likewise; equal to ``empty`` where the format has one density.

    Raises:
        ValueError: a figure is missing, negative or not finite, or a kept place costs less than an empty one.
    """

    overhead: float
    empty: tuple[float, ...]
    full: tuple[float, ...]

    def __post_init__(self) -> None:
        figures = (self.overhead, *self.empty, *self.full)
        if len(self.empty) != len(TOKENS) or len(self.full) != len(TOKENS):
            raise ValueError(f"a speed wants {len(TOKENS)} figures, got {len(self.empty)} and {len(self.full)}")
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            raise ValueError(f"a speed wants finite figures of 0 or more, got {figures}")
        if any(full < empty for empty, full in zip(self.empty, self.full, strict=True)):
            raise ValueError(f"a kept place cannot cost less than an empty one, got {self.full} and {self.empty}")

    def seconds(self, out_features: int, in_features: int, density: float, tokens: int) -> float:
        """Predicted time of one op; ``density`` is the fraction that is kept, 0 to 1."""
        places = out_features * in_features
        times = [places * (e + density * (f - e)) for e, f in zip(self.empty, self.full, strict=True)]
        if tokens >= TOKENS[-1]:
            return self.overhead + times[-1] * tokens / TOKENS[-1]
        for (below, start), (above, end) in pairwise(zip(TOKENS, times, strict=True)):
            if tokens <= above:
                return self.overhead + start + (end - start) * (tokens - below) / (above - below)
        raise AssertionError(tokens)


def fit(overhead: float, seconds: Mapping[float, tuple[float, ...]]) -> Speed:
    """The speed that explains what was measured.

    Args:
        overhead: seconds of an op without work.
        seconds: for one or two densities, the seconds of one place of the weight for each of ``TOKENS``. With one
            density every weight of the format has it.

    Returns:
        The line through two densities; flat at their mean where noise makes it fall, and never below 0.
    """
    low, high = min(seconds), max(seconds)
    empty, full = [], []
    for at_low, at_high in zip(seconds[low], seconds[high], strict=True):
        rise = max(at_high - at_low, 0.0) / (high - low) if high > low else 0.0
        nothing = max((at_low + at_high) / 2 - rise * (low + high) / 2, 0.0)
        empty.append(nothing)
        full.append(nothing + rise)
    return Speed(overhead, tuple(empty), tuple(full))


def format_name(pattern: Pattern, storage: Storage) -> str:
    """What decides the speed of a sparse op: the op, its N:M if it has one, and the storage."""
    parts = [op_name(pattern, storage), str(pattern) if isinstance(pattern, NM) else "", storage.kind]
    return " ".join(part for part in (*parts, f"group {storage.group}" if storage.group else "") if part)


def why_dense(sparse: Speed, dense: Speed, *, out_features: int, in_features: int, density: float, tokens: int) -> str:
    """The reason to leave a weight dense: both predicted times; "" where sparse is not slower."""
    ours = sparse.seconds(out_features, in_features, density, tokens)
    theirs = dense.seconds(out_features, in_features, 1.0, tokens)
    if ours <= theirs:
        return ""
    noun = "token" if tokens == 1 else "tokens"
    return f"sparse would take {ours * 1e6:.1f} us for {tokens} {noun} here, dense {theirs * 1e6:.1f} us"
