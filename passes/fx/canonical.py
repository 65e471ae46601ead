"""Bring a traced graph into one form, so that every later pass sees ``aten.linear`` and nothing else."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .complex_pairs import split_complex
from .experts import split_experts
from .products import Turned, products_to_linears
from .replace import replace_node

aten = torch.ops.aten


def canonicalise(program: ExportedProgram) -> dict[str, Turned]:
    """Drop what does nothing and write every product with a parameter as a ``linear``.

    Before:  y = addmm(b, x, W)                 W [in, out]   (GPT-2's Conv1D; others: see ``products_to_linears``)
             y = matmul(x, W.T)                 W [out, in]   (Falcon's)
             attention(q, k, v)                 one head of k and v for all of q, by broadcasting
             x[..., [-2], :]                    numbers one after the other (how Falcon takes k and v)
             _assert_tensor_metadata(x, ...)    says what the dtype was while tracing
             x[:], x.to(x.dtype), dropout(x) in evaluation, x * 1.0, x.reshape(x.shape)
    After:   y = linear(x, W, b)                W [out, in], in the program's state_dict
             y = linear(x, W)
             attention(q, expand(k), expand(v))
             x[..., 6:7, :]
             (no assertion)
             x
    Complex numbers become pairs of real ones (`split_complex`), stacks of experts linears (`split_experts`).
    Left alone: a product whose weight is not a parameter or is read by anything else.
    Numerics: the same products; the sum may run in another order.

    Returns:
        The parameters that now lie otherwise than in the model, by key.
    """
    split_complex(program)
    graph = program.graph_module.graph
    names = parameter_names(program)
    turned = products_to_linears(program, names)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _is_identity(node):
            replace_node(program, node, node.all_input_nodes[0])
        elif node.target in (aten.matmul.default, aten.mm.default) and _is_turned_weight(node.args[1], names):
            x, flipped = node.args
            with graph.inserting_before(node):
                linear = graph.call_function(aten.linear.default, (x, flipped.args[0]))
            linear.meta = dict(node.meta)
            replace_node(program, node, linear)
        elif node.target is aten.index.Tensor and (span := _span(program, node, names)) is not None:
            with graph.inserting_before(node):
                part = graph.call_function(aten.slice.Tensor, (node.args[0], *span))
            part.meta = dict(node.meta)
            replace_node(program, node, part)
        elif node.target is aten.scaled_dot_product_attention.default:
            _repeat_the_only_head(node)
    turned |= split_experts(program, names)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return turned


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name to key in ``state_dict`` or ``constants``, for every parameter, buffer and constant."""
    wanted = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in wanted and spec.target is not None
    }


def _repeat_the_only_head(attention: torch.fx.Node) -> None:
    """Write out that all query heads read the same keys and values, which ONNX does not broadcast."""
    args: Any = attention.args
    query, *others = args[:3]
    heads = query.meta["val"].shape[1]
    for other in dict.fromkeys(others):
        value = other.meta["val"]
        if value.dim() == 4 and value.shape[1] == 1 and heads != 1:
            with attention.graph.inserting_before(attention):
                wide = attention.graph.call_function(aten.expand.default, (other, [-1, heads, -1, -1]))
            wide.meta = {**other.meta, "val": value.expand(-1, heads, -1, -1)}
            attention.replace_input_with(other, wide)


def _is_turned_weight(value: Any, names: dict[str, str]) -> bool:
    """Whether a value is the transpose of a parameter matrix."""
    if not value.args or not isinstance(value.args[0], torch.fx.Node) or value.args[0].name not in names:
        return False
    weight = value.args[0].meta["val"]
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    if value.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if value.target is aten.transpose.int:
        return {int(axis) % 2 for axis in value.args[1:3]} == {0, 1}
    return value.target is aten.permute.default and [int(axis) % 2 for axis in value.args[1]] == [1, 0]


def _span(program: ExportedProgram, node: torch.fx.Node, names: Mapping[str, str]) -> tuple[int, int, int] | None:
    """The axis, begin and end that an index takes, where it is one list of constants, one after the other."""
    whole: Any = node.args[0]
    indices: Any = node.args[1]
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    axis, index = given[0]
    while index.op == "call_function" and index.target in (aten.lift_fresh_copy.default, aten.clone.default):
        index = index.args[0]
    places, size = program.constants.get(names.get(index.name, "")), whole.meta["val"].shape[axis]
    if not isinstance(places, torch.Tensor) or places.dim() != 1 or not len(places) or not isinstance(size, int):
        return None
    if places.is_floating_point() or places.dtype == torch.bool:
        return None
    found = [int(place) % size for place in places]
    follow = found == list(range(found[0], found[0] + len(found)))
    return (axis, found[0], found[-1] + 1) if follow else None


def _is_identity(node: torch.fx.Node) -> bool:
    """Whether the node returns its first argument as it is."""
    if node.target is aten.slice.Tensor:
        given: list[object] = list(node.args[2:])
        defaults: list[object] = [None, None, 1]
        start, end, step = given + defaults[len(given) :]
        return start in (None, 0) and end in (None, sys.maxsize) and step == 1
    if node.target is aten.mul.Tensor:  # rotary scaling; the fusion of rotary embeddings looks for cos and sin alone
        factor = node.args[1]
        return isinstance(factor, float) and factor == 1.0 and _same_type(node)
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target in (aten.reshape.default, aten.view.default):
        before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
        same = [statically_known_true(old == new) for old, new in zip(before, after, strict=False)]
        return len(before) == len(after) and all(same)
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default):
        return _same_type(node)
    return False


def _same_type(node: torch.fx.Node) -> bool:
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)
