"""The linears that a fused one of an ONNX file is made of, by what reads its result."""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from ..parts import ONE, Axes, Parts, Reader, find_parts
from .linears import Linear
from .protos import opened
from .unfold import MICROSOFT
from .view import STANDARD, Model


def parts_of(model: Model, linears: Sequence[Linear]) -> Parts:
    """The linears that a weight is made of, such as q, k and v, if all that read it agree on it; see ``find_parts``.

    Outputs are followed through Reshape, Transpose and Identity to Split, Slice and Gather, and to the
    GroupQueryAttention that takes q, k and v in one tensor.
    """
    outputs = model.outputs()
    rows = linears[0].weight.shape[0]

    def readers(value: gs.Tensor, axes: Axes) -> Iterator[Reader[gs.Tensor]]:
        if value.name in outputs:
            yield None
        for node in value.outputs:
            yield from _reader(model, node, value, axes)

    found = {find_parts(linear.y, rows, readers) for linear in linears}
    return found.pop() if len(found) == 1 else ONE


def _reader(model: Model, node: gs.Node, value: gs.Tensor, axes: Axes) -> Iterator[Reader[gs.Tensor]]:
    """What one node makes of a value that holds the outputs of a linear; see ``find_parts``."""
    if node.domain == MICROSOFT and node.op == "GroupQueryAttention":
        yield from _attention(node, value, axes)
        return
    if (node.domain or "") not in STANDARD or node.inputs[0] is not value:
        yield None
    elif node.op in ("Identity", "Reshape", "Transpose"):
        yield moved(model, node, value, axes)
    elif node.op in ("Split", "Slice", "Gather"):
        place, ranges = {"Split": _split, "Slice": _slice, "Gather": _gather}[node.op](model, node, axes)
        yield from [axes.cut(place, *each) for each in ranges] if place in axes.places and ranges else [None]
    else:
        yield None


def moved(model: Model, node: gs.Node, value: gs.Tensor, axes: Axes) -> tuple[gs.Tensor, Axes] | None:
    """Where a node that only moves numbers puts the outputs of a linear; None for another node, or if not known."""
    if (node.domain or "") not in STANDARD or node.inputs[0] is not value:
        return None
    if node.op == "Identity":
        return node.outputs[0], axes
    if node.op == "Reshape":
        after = axes.reshaped(_shape(model, node.inputs[1], math.prod(axes.sizes)))
        return None if after is None else (node.outputs[0], after)
    if node.op == "Transpose" and "perm" in node.attrs:
        return node.outputs[0], axes.permuted(node.attrs["perm"])
    return None


Ranges = tuple[int | None, Sequence[tuple[int, int]]]
"""An axis, counted from the end, and what is taken of it; None and nothing where that is not known."""


def _split(model: Model, node: gs.Node, axes: Axes) -> Ranges:
    given = node.inputs[1] if len(node.inputs) > 1 and node.inputs[1].name else None
    sizes = node.attrs.get("split") or ints(model, given)
    if sizes is None and given is not None:
        return None, []  # computed
    place = _place(model, node, node.attrs.get("axis", 0))
    if place is None and sizes and sum(sizes) == axes.sizes[-1] and axes.places[-1] == -1:
        place = -1  # the rank is not known, the sizes are those of the last axis
    if place in axes.places and not sizes:
        size, count = axes.sizes[axes.places.index(place)], node.attrs.get("num_outputs", len(node.outputs))
        each = -(-size // count)
        sizes = [min(each, size - each * index) for index in range(count)]
    ends = list(accumulate(sizes or []))
    return place, list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def _slice(model: Model, node: gs.Node, axes: Axes) -> Ranges:
    begins, ends, wanted, steps = (
        ints(model, node.inputs[index] if index < len(node.inputs) else None) for index in range(1, 5)
    )
    if begins is None or ends is None or wanted is None or len(wanted) != 1 or steps not in (None, [1]):
        return None, []
    place = _place(model, node, wanted[0])
    if place not in axes.places:
        return None, []
    begin, end, _ = slice(begins[0], ends[0]).indices(axes.sizes[axes.places.index(place)])
    return place, [(begin, end)]


def _gather(model: Model, node: gs.Node, axes: Axes) -> Ranges:
    chosen, place = ints(model, node.inputs[1]), _place(model, node, node.attrs.get("axis", 0))
    if chosen is None or len(chosen) != 1 or place not in axes.places:
        return None, []
    index = chosen[0] % axes.sizes[axes.places.index(place)]
    return place, [(index, index + 1)]


def _attention(node: gs.Node, value: gs.Tensor, axes: Axes) -> Iterator[Reader[gs.Tensor]]:
    """GroupQueryAttention takes q, k and v one after the other where it is given no keys and values."""
    packed = node.inputs[0] is value and not node.inputs[1].name and not node.inputs[2].name
    heads, shared = node.attrs["num_heads"], node.attrs["kv_num_heads"]
    if not packed or axes.places != (-1,) or axes.sizes[0] % (heads + 2 * shared):
        yield None
        return
    size = axes.sizes[0] // (heads + 2 * shared)
    begin = 0
    for count in (heads, shared, shared):
        yield axes.cut(-1, begin, begin := begin + count * size)


def _shape(model: Model, tensor: gs.Tensor, outputs: int) -> list[int | None]:
    """What a Reshape makes, as far as it is known from the end; the axes in front are those of the tokens."""
    known: list[int | None] = []
    for part in tensor.inputs[0].inputs if tensor.inputs and tensor.inputs[0].op == "Concat" else [tensor]:
        known += ints(model, part) or [None]
    for index in range(1, len(known)):
        behind = [size for size in known[index + 1 :] if size]
        if known[index] == -1 and len(behind) == len(known[index + 1 :]) and outputs % math.prod(behind) == 0:
            known[index] = outputs // math.prod(behind)
    return [size if size and size > 0 else None for size in known]


def _place(model: Model, node: gs.Node, axis: int) -> int | None:
    """An axis of what a node reads, counted from the end; None where the rank is not known."""
    if axis < 0:
        return axis
    rank = _rank(model, node.inputs[0])
    return None if rank is None else axis - rank


def _rank(model: Model, tensor: gs.Tensor) -> int | None:
    """How many axes a tensor has, by what the file says of it or by what made it."""
    if tensor.shape is not None:
        return len(tensor.shape)
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None:
        return None
    if maker.op == "Transpose" and "perm" in maker.attrs:
        return len(maker.attrs["perm"])
    if maker.op != "Reshape":
        return None
    target = maker.inputs[1]
    parts = target.inputs[0].inputs if target.inputs and target.inputs[0].op == "Concat" else [target]
    lengths = [_length(model, part) for part in parts]
    return None if None in lengths else sum(length or 0 for length in lengths)


def _length(model: Model, tensor: gs.Tensor) -> int | None:
    """How many numbers a list has: a constant, or one number that was made a list of."""
    numbers = ints(model, tensor)
    if numbers is not None:
        return len(numbers)
    return 1 if tensor.inputs and tensor.inputs[0].op == "Unsqueeze" else None


def ints(model: Model, tensor: gs.Tensor | None) -> list[int] | None:
    """The numbers of a constant."""
    proto = None if tensor is None else model.constants.get(tensor.name)
    if proto is None:
        return None
    return [int(number) for number in opened(proto, model.folder).numpy().reshape(-1)]
