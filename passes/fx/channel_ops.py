"""What each ATen operation does to channels, in terms of the primitives of ``channel_values``.

An operation that is not here, writes in place, or is used in a way its rule does not cover raises
``Unknown``; the walk then pins everything that touches it. So a missing rule costs a fold, never a wrong one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .channel_atoms import Atoms
from .channel_shapes import SHAPE_RULES, SPLITS, Arguments, Result, Rule, split
from .channel_values import Parameter, ParameterAtoms, Shape, Unknown, Value, contract, known, pointwise, reduce, spread


def _project(
    params: ParameterAtoms, x: Value, weight: Parameter, bias: Value | None, shape: Shape, columns: int = 1
) -> Value:
    """``x @ weight.T + bias``; ``columns`` is the dimension of ``weight`` that meets the last axis of ``x``."""
    atoms = params.atoms
    products = pointwise(atoms, [x, params.dimension(weight, columns, params.consumers)], x.shape)
    sums = reduce(atoms, products, [len(x.shape) - 1])
    rows = params.dimension(weight, 1 - columns, params.producers)
    return pointwise(atoms, [sums, rows, *([] if bias is None else [bias])], shape)


def _linear(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    if not isinstance(a["weight"], Parameter):
        raise Unknown
    bias = None if a["bias"] is None else params.value(a["bias"])
    return _project(params, params.value(a["input"]), a["weight"], bias, shape)


def _addmm(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    if not isinstance(a["mat2"], Parameter):
        raise Unknown
    return _project(params, params.value(a["mat1"]), a["mat2"], params.value(a["self"]), shape, columns=0)


def _matmul(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    left, right = a["self"], a.get("other", a.get("mat2"))
    if isinstance(right, Parameter) and len(right.shape) == 2:
        return _project(params, params.value(left), right, None, shape, columns=0)
    left, right = params.value(left), params.value(right)
    if len(left.shape) < 2 or len(right.shape) < 2:
        raise Unknown
    return contract(params.atoms, left, right)


def _attention(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    query, key, value = (params.value(a[name]) for name in ("query", "key", "value"))
    if a["dropout_p"]:
        raise Unknown
    if a["enable_gqa"]:
        key, value = (_repeat_heads(params.atoms, x, known(query.shape[-3])) for x in (key, value))
    scores = contract(params.atoms, query, _swap(key, -1, -2))
    if a["attn_mask"] is not None:
        scores = pointwise(params.atoms, [scores, params.value(a["attn_mask"])], scores.shape)
    return contract(params.atoms, _normalised(params.atoms, scores, [len(scores.shape) - 1]), value)


def _repeat_heads(atoms: Atoms, value: Value, heads: int) -> Value:
    axis = len(value.shape) - 3
    value = spread(atoms, value, [axis])
    copies = heads // known(value.shape[axis])
    shape = (*value.shape[:axis], heads, *value.shape[axis + 1 :])
    return Value(shape, value.atoms.repeat(copies, axis))


def _normalised(atoms: Atoms, value: Value, axes: Sequence[int], others: Sequence[Value] = ()) -> Value:
    return pointwise(atoms, [value, reduce(atoms, value, axes), *others], value.shape)


def _softmax(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    return _normalised(params.atoms, params.value(a["self"]), [a["dim"] % len(shape)])


def _layer_norm(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    axes = list(range(len(shape) - len(a["normalized_shape"]), len(shape)))
    gains = [params.value(a[name]) for name in ("weight", "bias") if a.get(name) is not None]
    return _normalised(params.atoms, params.value(a["input"]), axes, gains)


def _tokens_of(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    """Some of the rows: nothing that their channels are changes."""
    value = params.value(a["x"])
    if value.tracked(0):
        raise Unknown
    return Value(shape, value.atoms)


def _by_token(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    """Rows of different experts in one tensor: what reads it reads the same channel of all of them."""
    return pointwise(params.atoms, [params.value(found) for found in a["found"]], shape)


def _reduce(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    value = params.value(a["self"])
    rank = len(value.shape)
    dims = a.get("dim")
    axes = range(rank) if dims is None or dims == [] else [d % rank for d in np.atleast_1d(dims).tolist()]
    return reduce(params.atoms, value, list(axes), keep=bool(a.get("keepdim", False)))


def _embedding(params: ParameterAtoms, a: Arguments, shape: Shape) -> Result:
    table = a["weight"]
    if not isinstance(table, Parameter) or a["scale_grad_by_freq"] or a["sparse"]:
        raise Unknown
    params.atoms.pin(params.dimension(table, 0).atoms)
    ids = params.value(a["indices"])
    ids = Value((*ids.shape, 1), ids.atoms[..., None])
    return pointwise(params.atoms, [ids, params.dimension(table, 1, params.producers)], shape)


def _swap(value: Value, one: int, other: int) -> Value:
    order = list(range(len(value.shape)))
    order[one], order[other] = order[other], order[one]
    return Value(tuple(value.shape[d] for d in order), value.atoms.transpose(order))


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    "aten::linear": _linear,
    "aten::addmm": _addmm,
    **dict.fromkeys(["aten::matmul", "aten::mm", "aten::bmm"], _matmul),
    "aten::scaled_dot_product_attention": _attention,
    "aten::softmax": _softmax,
    **dict.fromkeys(["aten::layer_norm", "aten::rms_norm"], _layer_norm),
    **dict.fromkeys(
        ["aten::mean", "aten::sum", "aten::var", "aten::amax", "aten::amin", "aten::linalg_vector_norm"], _reduce
    ),
    "aten::embedding": _embedding,
    "sparsify::tokens_of": _tokens_of,
    "sparsify::by_token": _by_token,
}

UNTAGGED_POINTWISE = {"aten::hardswish", "aten::log_sigmoid", "aten::__and__", "aten::__or__", "aten::masked_fill"}


def apply(params: ParameterAtoms, target: object, arguments: Arguments, shapes: Shape | list[Shape]) -> Result:
    """Follow one operation.

    Args:
        params: the atoms of the graph and of its parameters.
        target: what the node calls.
        arguments: by name in the operation's schema; tensors as values, everything else as in the graph.
        shapes: shape of the result, or one for each if there are several.

    Raises:
        Unknown: there is no rule for this use of the operation.
    """
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        raise Unknown
    name = target._schema.name
    if isinstance(shapes, list):
        if name not in SPLITS:
            raise Unknown
        return split(params, arguments, shapes)
    if name in RULES:
        return RULES[name](params, arguments, shapes)
    # torch's own word for "each entry of the result depends on the entries at its position only"
    if name not in UNTAGGED_POINTWISE and torch.Tag.pointwise not in target.tags:
        raise Unknown
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise Unknown
    return pointwise(params.atoms, [params.value(operand) for operand in tensors(arguments)], shapes)


def tensors(argument: Any) -> list[Value | Parameter]:
    """Every tensor in an argument, however deeply nested."""
    if isinstance(argument, (Value, Parameter)):
        return [argument]
    if isinstance(argument, Mapping):
        argument = list(argument.values())
    if isinstance(argument, (list, tuple)):
        return [found for item in argument for found in tensors(item)]
    return []
