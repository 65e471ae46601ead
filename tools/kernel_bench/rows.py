"""What is measured: one row is one weight, its format, and a number of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TYPES = ("f32", "bf16", "f16", "i8", "i4")
OPPONENTS = ("dense", "int8", "int4-32", "int4-128", "deepsparse")


@dataclass(frozen=True)
class Row:
    """A weight [rows, cols] of ours, and the tokens it is multiplied with.

    ``sparsity`` counts for the format "bitmask", ``nm`` for "nm", and ``group`` for the type "i4".
    """

    format: str
    type: str
    rows: int
    cols: int
    tokens: int
    nm: tuple[int, int] = (2, 4)
    sparsity: float = 0.5
    group: int = 32

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.nm[0] / self.nm[1] if self.format == "nm" else 1 - self.sparsity

    @property
    def shape(self) -> str:
        """N x K."""
        return f"{self.rows}x{self.cols}"

    @property
    def kernel(self) -> str:
        """Format and type, as a table names them."""
        pattern = f"{self.nm[0]}:{self.nm[1]}" if self.format == "nm" else f"bitmask {self.sparsity:.0%}"
        return f"{pattern} {self.type}" + (f" group {self.group}" if self.type == "i4" else "")


class Requirement(NamedTuple):
    """One line of the issue's table for one shape: ``row`` against an opponent, or against its "floor"."""

    row: Row
    against: str
    required: float
    stretch: float


def required(shapes: list[tuple[int, int]]) -> Iterator[Requirement]:
    """The kernel rows of the issue's table "It must show"; 4-bit weights meet blocks of the size of their groups."""

    def lines(tokens: int, kernels: list[dict], against: str, required: float, stretch: float) -> Iterator[Requirement]:
        for rows, cols in shapes:
            for kernel in kernels:
                yield Requirement(Row(rows=rows, cols=cols, tokens=tokens, **kernel), against, required, stretch)

    def kernel(format: str, type: str, **more: object) -> dict:
        return {"format": format, "type": type, **more}

    half_f32 = [kernel("nm", "f32"), kernel("bitmask", "f32")]
    every = [
        kernel(format, type, group=group)
        for format in ("nm", "bitmask")
        for type in TYPES
        for group in ((32, 128) if type == "i4" else (32,))
    ]
    most_zero = [kernel("bitmask", "f32", sparsity=0.8)]
    yield from lines(1, every, "floor", 0.8, 0.9)
    yield from lines(1, half_f32, "dense", 2.0, 2.4)
    yield from lines(1, half_f32, "deepsparse", 2.0, 2.4)
    yield from lines(1, [kernel("nm", "i8")], "int8", 1.6, 1.9)
    yield from lines(1, [kernel("nm", "i4", group=32)], "int4-32", 1.5, 1.7)
    yield from lines(1, [kernel("nm", "i4", group=128)], "int4-128", 1.05, 1.25)
    yield from lines(16, [kernel("nm", "f32")], "dense", 1.8, 2.2)
    yield from lines(256, half_f32, "dense", 1.5, 1.7)
    yield from lines(256, half_f32, "deepsparse", 1.05, 1.15)
    yield from lines(256, most_zero, "dense", 2.3, 2.8)
    yield from lines(256, most_zero, "deepsparse", 1.0, 1.2)
    yield from lines(256, [kernel("nm", "bf16")], "dense", 2.2, 3.0)
    yield from lines(256, [kernel("nm", "i8")], "int8", 1.15, 1.4)


def over_tokens(rows: int, cols: int) -> list[Row]:
    """Left half of the plot: fp32 at 50 %, 1 to 512 tokens."""
    return [Row(format, "f32", rows, cols, 1 << power) for format in ("nm", "bitmask") for power in range(10)]


def over_sparsity(rows: int, cols: int) -> list[Row]:
    """Right half of the plot: fp32 bitmask at 1 and 256 tokens, sparsity 0.3 to 0.95."""
    steps = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    return [Row("bitmask", "f32", rows, cols, tokens, sparsity=step) for tokens in (1, 256) for step in steps]
