"""Write complex numbers as their real and imaginary parts: ONNX has no ops for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import InputError
from .replace import replace_node

aten = torch.ops.aten
PLACED = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.index_select.default,
}  # fmt: skip
"""Ops that only move numbers."""
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}

MAKERS = {aten.polar.default, aten.complex.default, aten.view_as_complex.default}
"""Ops that make complex numbers of real ones."""

Pair = tuple[Node, Node]


def split_complex(program: ExportedProgram) -> None:
    """Let two nodes of real numbers stand for every complex one, in place.

    Before:  c = polar(r, a) | complex(re, im) | view_as_complex(x);  d = c * e;  y = view_as_real(d)
    After:   (r cos a, r sin a) | (re, im) | (x[..., 0], x[..., 1]);  (ce - c'e', ce' + c'e);  y = stack(d, d')
             and what only moves numbers moves both parts
    Left alone: complex numbers that something else makes, such as a Fourier transform, which ONNX has an op for (FNet).
    Numerics: the same products and sums.

    Raises:
        InputError: something else is done with complex numbers, or they are a parameter.
    """
    graph = program.graph_module.graph
    pairs: dict[Node, Pair] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not (_is_complex(node) or any(n in pairs for n in node.all_input_nodes)):
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        if node.target not in MAKERS and not any(n in pairs for n in node.all_input_nodes):
            continue
        with graph.inserting_before(node):
            made = _parts(node, pairs, _caller(node))
        if made is None:
            raise InputError(f"the model cannot be written as ONNX: it gives complex numbers to {node.target}")
        if isinstance(made, Node):
            replace_node(program, node, made)
        else:
            pairs[node] = made
    for node in reversed(pairs):
        graph.erase_node(node)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _caller(node: Node) -> Callable[..., Node]:
    """Makes nodes that stand where ``node`` does."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        made: Node = node.graph.call_function(target, args, kwargs)
        given = map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta = {**node.meta, "val": target(*given[0], **given[1])}
        return made

    return call


def _parts(node: Node, pairs: dict[Node, Pair], call: Callable[..., Node]) -> Pair | Node | None:
    """The parts of a complex result, or a real result; None where there is no rule."""
    args: Any = node.args
    target = node.target
    if target is aten.polar.default:
        size, angle = args
        return call(aten.mul.Tensor, size, call(aten.cos.default, angle)), call(
            aten.mul.Tensor, size, call(aten.sin.default, angle)
        )
    if target is aten.complex.default:
        return args[0], args[1]
    if target is aten.view_as_complex.default:
        return call(aten.select.int, args[0], -1, 0), call(aten.select.int, args[0], -1, 1)
    if target is aten.view_as_real.default and args[0] in pairs:
        return call(aten.stack.default, [*pairs[args[0]]], -1)
    if target is aten.mul.Tensor:
        return _product(*(pairs.get(arg, arg) if isinstance(arg, Node) else arg for arg in args), call=call)
    if args and args[0] in pairs and _is_complex(node):
        if target in CASTS and node.meta["val"].dtype == args[0].meta["val"].dtype:
            return pairs[args[0]]
        if target in PLACED and not any(n in pairs for n in node.all_input_nodes[1:]):
            real, imaginary = (call(target, part, *args[1:], **node.kwargs) for part in pairs[args[0]])
            return real, imaginary
    return None


def _product(one: Any, other: Any, *, call: Callable[..., Node]) -> Pair:
    """``(a + bi)(c + di)``, or that of a complex and a real number."""
    if not isinstance(one, tuple):
        one, other = other, one
    a, b = one
    if not isinstance(other, tuple):
        return call(aten.mul.Tensor, a, other), call(aten.mul.Tensor, b, other)
    c, d = other

    def times(x: Node, y: Node) -> Node:
        return call(aten.mul.Tensor, x, y)

    real = call(aten.sub.Tensor, times(a, c), times(b, d))
    return real, call(aten.add.Tensor, times(a, d), times(b, c))
