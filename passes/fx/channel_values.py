"""The values that channels flow through: what sits at every position of a tensor, and the primitives on it.

Every operation is built from two primitives. *Pointwise* makes one new atom for every distinct combination
of atoms that meets at a position, tied to all of them. *Reduce* sums an axis away: the result does not care
about the order along the axis, so the atoms are only marked with the place they are summed into. A linear is
pointwise (input times columns), reduce, pointwise (plus rows and bias).

An axis is *tracked* if its positions carry atoms of their own. Other axes (tokens, batch, everything of a
value that nobody may reorder) are *still*: their positions never move, and one atom stands for all of them.
Invariant: two positions of one value with the same atom hold the same function of the still axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .channel_atoms import Atoms, IntArray

Size = int | torch.SymInt
Shape = tuple[Size, ...]

MOST_POSITIONS = 1 << 24
"""A value with more tracked positions is pinned: 2**24 int64 are 128 MiB, far above any activation's channels."""


class Unknown(Exception):
    """The operation cannot be followed; whatever it touches must be pinned."""


@dataclass(frozen=True)
class Value:
    """A tensor as the dataflow sees it.

    Attributes:
        shape: the real shape; token dimensions are symbolic.
        atoms: same rank; a tracked axis has its real size, a still axis has size 1.
    """

    shape: Shape
    atoms: IntArray

    def tracked(self, axis: int) -> bool:
        """Whether the positions along ``axis`` carry their own atoms."""
        return int(self.atoms.shape[axis]) != 1

    def with_leading(self, rank: int) -> "Value":
        """The same value with axes of size 1 in front, as broadcasting does."""
        extra = rank - len(self.shape)
        return Value((1,) * extra + self.shape, self.atoms.reshape((1,) * extra + self.atoms.shape))


@dataclass(frozen=True)
class Parameter:
    """A parameter, or its transpose; each dimension has atoms of its own until an operation reads the entries.

    Attributes:
        name: fully qualified parameter name.
        shape: the shape as seen here.
        dims: for each dimension seen here, the dimension of the stored parameter.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]


def still(atoms: Atoms, shape: Shape) -> Value:
    """Return a value of which nothing moves."""
    return Value(shape, atoms.fresh((1,) * len(shape), pinned=True))


def spread(atoms: Atoms, value: Value, axes: Sequence[int]) -> Value:
    """Give the positions along ``axes`` atoms of their own: each knows its place and is tied to what it was."""
    axes = [axis for axis in axes if not value.tracked(axis) and known(value.shape[axis]) > 1]
    if not axes:
        return value
    target = tuple(
        known(size) if axis in axes else have
        for axis, (size, have) in enumerate(zip(value.shape, value.atoms.shape, strict=True))
    )
    _check_size(target)
    if atoms.pinned(value.atoms):
        return Value(value.shape, atoms.fresh(target, pinned=True))
    # One new atom for every old atom and place, so that copies stay copies.
    place_shape = tuple(size if axis in axes else 1 for axis, size in enumerate(target))
    places = np.arange(math.prod(place_shape)).reshape(place_shape)
    result, (old, place) = _one_each(atoms, [np.broadcast_to(a, target) for a in (value.atoms, places)])
    atoms.tie(result.unique, old)
    atoms.mark(result.unique, place)
    return Value(value.shape, result.atoms)


def pointwise(atoms: Atoms, operands: Sequence[Value], shape: Shape, also_still: int | None = None) -> Value:
    """Combine values position by position, with broadcasting.

    Args:
        atoms: the atoms of the graph.
        operands: at least one.
        shape: real shape of the result.
        also_still: an axis along which the operands' sizes may differ (they are joined along it) and nothing moves.

    Raises:
        Unknown: the operands are not broadcast to ``shape``, or an axis is tracked in one and symbolic in another.
    """
    if any(len(operand.shape) > len(shape) for operand in operands):
        raise Unknown
    operands = [operand.with_leading(len(shape)) for operand in operands]
    tracked = [axis for axis in range(len(shape)) if any(operand.tracked(axis) for operand in operands)]
    if also_still in tracked:
        raise Unknown
    # An unmovable operand with another entry at every position: nothing can move, and no atoms are needed.
    for operand in operands:
        if atoms.pinned(operand.atoms) and all(_varies(operand, axis) for axis in tracked):
            for other in operands:
                atoms.pin(other.atoms)
            return still(atoms, shape)

    operands = [spread(atoms, operand, [a for a in tracked if _varies(operand, a)]) for operand in operands]
    for operand in operands:
        # A scale per head, say: keeping its heads in place leaves the channels inside a head free.
        if tracked and not operand.tracked(tracked[-1]):
            atoms.pin(operand.atoms)
    target = tuple(known(shape[axis]) if axis in tracked else 1 for axis in range(len(shape)))
    _check_size(target)
    result, sources = _one_each(atoms, [np.broadcast_to(operand.atoms, target) for operand in operands])
    for source in sources:
        if atoms.pinned(source):
            atoms.mark(result.unique, source)
        else:
            atoms.tie(result.unique, source)
    return Value(shape, result.atoms)


def reduce(atoms: Atoms, value: Value, axes: Sequence[int], *, keep: bool = True) -> Value:
    """Sum, average or take the largest along ``axes``: any symmetric function of what is there."""
    shape: Shape = tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))
    if any(value.tracked(axis) for axis in axes):
        target = tuple(1 if axis in axes else size for axis, size in enumerate(value.atoms.shape))
        sums = atoms.fresh(target, pinned=True)
        atoms.mark(value.atoms, np.broadcast_to(sums, value.atoms.shape))
        result = Value(shape, sums)
    elif atoms.pinned(value.atoms):
        result = Value(shape, value.atoms)
    else:
        result = pointwise(atoms, [Value(shape, value.atoms)], shape)
    if keep:
        return result
    left = [axis for axis in range(len(shape)) if axis not in axes]
    return Value(tuple(shape[a] for a in left), result.atoms.reshape([result.atoms.shape[a] for a in left]))


def contract(atoms: Atoms, left: Value, right: Value) -> Value:
    """Matrix product of ``[..., I, K]`` and ``[..., K, J]``."""
    columns = Value((*left.shape, 1), left.atoms[..., None])
    rows = Value((*right.shape[:-2], 1, *right.shape[-2:]), right.atoms[..., None, :, :])
    rank = max(len(columns.shape), len(rows.shape))
    columns, rows = columns.with_leading(rank), rows.with_leading(rank)
    shape = tuple(b if is_one(a) else a for a, b in zip(columns.shape, rows.shape, strict=True))
    return reduce(atoms, pointwise(atoms, [columns, rows], shape), [rank - 2], keep=False)


def known(size: Size) -> int:
    """The size as a number.

    Raises:
        Unknown: it is symbolic.
    """
    if not isinstance(size, int):
        raise Unknown
    return size


def is_one(size: Size) -> bool:
    """Whether the size is 1 for certain; a symbolic size is not asked, which would specialise it."""
    return isinstance(size, int) and size == 1


class ParameterAtoms:
    """The atoms along the dimensions of every parameter, and what each dimension is used for.

    Attributes:
        along: atoms by (parameter name, dimension).
        producers: dimensions whose entries end up in channels: rows, biases, gains, embedding columns.
        consumers: dimensions along which channels are summed: the columns of linears.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.along: dict[tuple[str, int], IntArray] = {}
        self.producers: set[tuple[str, int]] = set()
        self.consumers: set[tuple[str, int]] = set()

    def dimension(self, parameter: Parameter, seen: int, uses: set[tuple[str, int]] | None = None) -> Value:
        """Return one dimension as a value of rank 1, and note its use in ``producers`` or ``consumers``."""
        key = (parameter.name, parameter.dims[seen])
        if key not in self.along:
            self.along[key] = self.atoms.fresh((parameter.shape[seen],))
        if uses is not None:
            uses.add(key)
        return Value((parameter.shape[seen],), self.along[key])

    def pin(self, parameter: Parameter) -> None:
        """Pin every dimension."""
        for seen in range(len(parameter.shape)):
            self.atoms.pin(self.dimension(parameter, seen).atoms)

    def value(self, operand: Value | Parameter) -> Value:
        """Read a parameter entry by entry: its last dimension larger than 1 carries channels, the rest are still."""
        if isinstance(operand, Value):
            return operand
        channel = max((axis for axis, size in enumerate(operand.shape) if size > 1), default=-1)
        shape = [1] * len(operand.shape)
        for axis in range(len(operand.shape)):
            if axis != channel:
                self.atoms.pin(self.dimension(operand, axis).atoms)
        if channel < 0:
            return still(self.atoms, operand.shape)
        shape[channel] = operand.shape[channel]
        return Value(operand.shape, self.dimension(operand, channel, self.producers).atoms.reshape(shape))


@dataclass(frozen=True)
class _New:
    atoms: IntArray  # by position
    unique: IntArray  # each once


def _one_each(atoms: Atoms, sources: Sequence[IntArray]) -> tuple[_New, list[IntArray]]:
    """New atoms, one for every distinct combination of sources at a position, and each one's sources."""
    code = np.zeros(sources[0].size, np.int64)
    for source in sources:
        _, digits = np.unique(source, return_inverse=True)
        # Ranks, not products of ranks, so that the code never exceeds size * size.
        _, code = np.unique(code * (int(digits.max(initial=0)) + 1) + digits.ravel(), return_inverse=True)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    unique = atoms.fresh((len(first),))
    return _New(unique[inverse].reshape(sources[0].shape), unique), [source.ravel()[first] for source in sources]


def _varies(value: Value, axis: int) -> bool:
    """Whether the contents differ along ``axis``; a symbolic size may be anything."""
    return not is_one(value.shape[axis])


def _check_size(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MOST_POSITIONS:
        raise Unknown
