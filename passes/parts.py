"""The linears that a fused one is made of: which of its outputs are q, which k and which v, as far as a graph tells.

A front end walks from the linear's result through what only moves its outputs, to where they are cut. It says what
each reader makes of the outputs' axes; what that means for the weight's rows is decided here, once for FX and for ONNX.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Parts:
    """What a linear is made of: rows of q, k and v one after the other, and that again for every head or group.

    Attributes:
        sizes: rows of each; empty for a linear that is one.
        repeats: how often they follow each other.
    """

    sizes: tuple[int, ...] = ()
    repeats: int = 1

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows of each linear, of a tensor ``[out_features, ...]``."""
        if not self.sizes:
            return [rows]
        grouped = rows.reshape(self.repeats, sum(self.sizes), *rows.shape[1:])
        return [part.flatten(0, 1) for part in torch.split(grouped, list(self.sizes), dim=1)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        if not self.sizes:
            return parts[0]
        grouped = [part.reshape(self.repeats, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)


ONE = Parts()


@dataclass(frozen=True)
class Axes:
    """Where the outputs of a linear are in a value made of them.

    Attributes:
        sizes: the outputs as a table, the last index running fastest.
        places: the axis of the value that each index is, counted from the end: -1 is the last.
    """

    sizes: tuple[int, ...]
    places: tuple[int, ...]

    def reshaped(self, shape: Sequence[object]) -> "Axes | None":
        """After a reshape to what ends in ``shape``; None where the outputs are not the last axes before and after."""
        total = math.prod(self.sizes)
        if self.places != tuple(range(-len(self.sizes), 0)):
            return None
        sizes: list[int] = []
        for size in reversed(shape):
            if not isinstance(size, int) or total % size:
                return None
            total //= size
            sizes.insert(0, size)
            if total == 1:
                return Axes(tuple(sizes), tuple(range(-len(sizes), 0)))
        return None

    def permuted(self, order: Sequence[int]) -> "Axes":
        """After a permutation of the value's axes, ``order`` as torch and ONNX give it."""
        new = {axis % len(order) - len(order): place - len(order) for place, axis in enumerate(order)}
        return Axes(self.sizes, tuple(new[place] for place in self.places))

    def cut(self, place: int, begin: int, end: int) -> "Cut":
        """A range of one of the axes."""
        return Cut(self.sizes, self.places.index(place), begin, end)


@dataclass(frozen=True)
class Cut:
    """A range of one index of the table of outputs."""

    sizes: tuple[int, ...]
    index: int
    begin: int
    end: int


Reader = tuple[Value, Axes] | Cut | None
"""What reads a value: something that moves it on, something that takes a range, or something that takes all of it."""


def find_parts(value: Value, outputs: int, readers: Callable[[Value, Axes], Iterable[Reader[Value]]]) -> Parts:
    """Follow the result of a linear to where it is cut; one linear if anything reads across the cuts.

    Behind a reshape into heads only a cut into three or more counts: there, a query alone is cut in two for its rotary
    positions. No cut is followed further, for the same reason.

    Args:
        value: the result, with the outputs as its last axis.
        outputs: how many there are.
        readers: what reads a value that holds all outputs.
    """
    cuts: set[Cut] = set()
    todo = [(value, Axes((outputs,), (-1,)))]
    while todo:
        for reader in readers(*todo.pop()):
            if reader is None:
                return ONE
            if isinstance(reader, Cut):
                cuts.add(reader)
            else:
                todo.append(reader)
    return _parts(cuts)


def _parts(cuts: set[Cut]) -> Parts:
    """What cuts of one index make of the outputs, if they cover it and none overlaps another."""
    if len({(cut.sizes, cut.index) for cut in cuts}) != 1 or len(cuts) < 2:
        return ONE
    ordered = sorted(cuts, key=lambda cut: cut.begin)
    sizes, index = ordered[0].sizes, ordered[0].index
    if len(sizes) > 1 and len(cuts) < 3:
        return ONE
    if [cut.begin for cut in ordered] != [0, *(cut.end for cut in ordered[:-1])] or ordered[-1].end != sizes[index]:
        return ONE
    unit = math.prod(sizes[index + 1 :])
    return Parts(tuple((cut.end - cut.begin) * unit for cut in ordered), math.prod(sizes[:index]))
