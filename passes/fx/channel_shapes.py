"""What the operations that only move entries around do to channels: reshape, transpose, slice, concatenate.

A value's atoms are an array of its shape, so most of these apply to it as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .channel_values import Parameter, ParameterAtoms, Shape, Unknown, Value, is_one, known, pointwise, spread, still

Result = Value | Parameter | tuple[Value, ...]
Arguments = Mapping[str, Any]
Rule = Callable[[ParameterAtoms, Arguments, Shape], Result]


def _same(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    """The same entries at the same positions; dropout only when it is off."""
    if a.get("train"):
        raise Unknown
    source: Result = a["self"] if "self" in a else a["input"]
    return source


def _constant(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    """A result that depends on the shape of the argument only."""
    return still(params.atoms, shape)


def _permute(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    source = a["self"]
    rank = len(source.shape)
    order = list(range(rank))
    if "dims" in a:
        order = [d % rank for d in a["dims"]]
    elif rank > 1:
        d0, d1 = (a.get("dim0", 0) % rank, a.get("dim1", 1) % rank)
        order[d0], order[d1] = d1, d0
    if isinstance(source, Parameter):
        return Parameter(source.name, tuple(source.shape[d] for d in order), tuple(source.dims[d] for d in order))
    return Value(tuple(source.shape[d] for d in order), source.atoms.transpose(order))


def _view(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    """Reshape: axes are matched group by group, a group being the fewest axes with equal products."""
    value = params.value(a["self"])
    atoms: list[int] = []
    for old, new in _groups(value.shape, shape):
        tracked = any(value.tracked(axis) for axis in old)
        if tracked:
            value = spread(params.atoms, value, old)
        atoms += [known(shape[axis]) if tracked else 1 for axis in new]
    return Value(shape, value.atoms.reshape(atoms))


def _groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    groups = []
    i = j = 0
    while i < len(old) and j < len(new):
        ends = [(i + p, j + n - p) for n in range(2, len(old) + len(new) - i - j + 1) for p in range(1, n)]
        fits = [(p, q) for p, q in ends if p <= len(old) and q <= len(new) and _equal(old[i:p], new[j:q])]
        if not fits:
            raise Unknown
        groups.append((range(i, fits[0][0]), range(j, fits[0][1])))
        i, j = fits[0]
    # What is left on either side are sizes of 1.
    groups.append((range(i, len(old)), range(j, len(new))))
    if not all(is_one(size) for size in (*old[i:], *new[j:])):
        raise Unknown
    return groups


def _equal(left: Shape, right: Shape) -> bool:
    difference = _product(left) - _product(right)
    return bool((difference if isinstance(difference, int) else difference.expand()) == 0)


def _product(sizes: Shape) -> Any:
    """A number or a sympy expression; comparing symbolic sizes themselves would specialise them."""
    return math.prod(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def _expand(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    value = params.value(a["self"]).with_leading(len(shape))
    # Copies share their atom. A symbolic axis, or one of a value that cannot move anyway, needs none of its own.
    moves = not params.atoms.pinned(value.atoms)
    target = [
        new if moves and isinstance(new, int) and is_one(old) else have
        for old, new, have in zip(value.shape, shape, value.atoms.shape, strict=True)
    ]
    return Value(shape, np.broadcast_to(value.atoms, target))


def _slice(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    value = params.value(a["self"])
    axis = a["dim"] % len(value.shape)
    if not value.tracked(axis):
        return Value(shape, value.atoms)
    start, end, step = a.get("start"), a.get("end"), a.get("step", 1)
    if "length" in a:
        end = known(a["start"]) + known(a["length"])
    where = [slice(None)] * len(shape)
    where[axis] = slice(*(None if x is None else known(x) for x in (start, end, step)))
    return Value(shape, value.atoms[tuple(where)])


def _select(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    value = params.value(a["self"])
    axis = a["dim"] % len(value.shape)
    return Value(shape, value.atoms.take([known(a["index"]) if value.tracked(axis) else 0], axis).squeeze(axis))


def split(params: ParameterAtoms, a: Arguments, shapes: Sequence[Shape]) -> Result:
    """Cut into pieces of the given shapes along one axis (chunk, split); pieces without the axis are unbind's."""
    value = params.value(a["self"])
    axis = a["dim"] % len(value.shape)
    pieces, start = [], 0
    for shape in shapes:
        size = shape[axis] if len(shape) == len(value.shape) else 1
        part = value.atoms
        if value.tracked(axis):
            part = part.take(range(start, start := start + known(size)), axis)
        if len(shape) < len(value.shape):
            part = part.squeeze(axis)
        pieces.append(Value(shape, part))
    return tuple(pieces)


def _concatenate(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    atoms, axis = params.atoms, a["dim"] % len(shape)
    pieces = [params.value(piece) for piece in a["tensors"]]
    if any(len(piece.shape) != len(shape) for piece in pieces):
        raise Unknown
    if not any(piece.tracked(axis) for piece in pieces):
        return pointwise(atoms, pieces, shape, also_still=axis)
    tracked = [i for i in range(len(shape)) if i == axis or any(piece.tracked(i) for piece in pieces)]
    parts = []
    for piece in pieces:
        piece = spread(atoms, piece, tracked)
        # New atoms, so that a piece which occurs twice, or next to a shifted self, is told apart.
        parts.append(piece.atoms if atoms.pinned(piece.atoms) else pointwise(atoms, [piece], piece.shape).atoms)
    return Value(shape, np.concatenate(parts, axis))


def _repeat(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    value = params.value(a["self"]).with_leading(len(shape))
    times = [known(n) if value.tracked(i) else 1 for i, n in enumerate(a["repeats"])]
    return Value(shape, np.tile(value.atoms, times))


def _names(*names: str) -> list[str]:
    return ["aten::" + name for name in names]


SPLITS = {"aten::chunk", "aten::split", "aten::split_with_sizes", "aten::unbind"}
SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(_names("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "dropout"), _same),
    **dict.fromkeys(_names("zeros_like", "ones_like", "full_like", "new_ones", "new_zeros", "new_full"), _constant),
    **dict.fromkeys(_names("transpose", "permute", "t"), _permute),
    **dict.fromkeys(_names("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"), _view),
    **dict.fromkeys(_names("expand", "expand_as"), _expand),
    **dict.fromkeys(_names("slice", "narrow"), _slice),
    "aten::select": _select,
    "aten::cat": _concatenate,
    "aten::repeat": _repeat,
}
