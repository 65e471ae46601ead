"""Bodies of the sparse ops for models of any opset from 11 on.

ONNX Runtime without our library puts a function's body into the model and reads it in the model's opset, whatever the
function says it imports (tried with 1.31; onnx.checker refuses a function whose ops changed in between). So the body
is rewritten for the model's opset. From 18 on that is a matter of the number, since no op of the bodies has changed
its meaning; below, the newer ops are put together from older ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx
from onnx import helper

from ..dialect.functions import with_shared
from ..dialect.packed import OPS
from ..errors import InputError
from .protos import remove

OLDEST = 11
WIDTH = "in_features"
INT64, FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT


def functions_for(nodes: Sequence[onnx.NodeProto], opset: int) -> list[onnx.FunctionProto]:
    """The bodies of the sparse ops among ``nodes`` and what they call, in ops of ``opset``.

    Raises:
        InputError: a body needs something that ``opset`` does not have.
    """
    used = {node.op_type for node in nodes}
    given: dict[str, set[int]] = {}
    for node in nodes:
        for attribute in node.attribute:
            given.setdefault(attribute.name, set()).add(attribute.i)
    common = {name: values.pop() for name, values in given.items() if len(values) == 1}
    bodies = with_shared(op.FUNCTION for name, op in OPS.items() if name in used)
    return [function_for(body, opset, common) for body in bodies]


def function_for(body: onnx.FunctionProto, opset: int, common: Mapping[str, int]) -> onnx.FunctionProto:
    """One body in ops of ``opset``, computing the same.

    Before:  Shape <start, end> | BitwiseAnd by 2^b - 1 | Unsqueeze (x, axes) | Pow of integers | Constant <value_int>
    After:   Shape, Slice       | Mod by 2^b            | Unsqueeze <axes>    | Pow of floats   | Constant <value>
             below opset 15       18                      13                    12                12
             ReduceMax and ReduceSum as Unsqueeze, below 18 and 13; ``in_features`` is read off x below 12
    Left alone: every other op.
    Numerics: the same integers; powers are of 2 and small, so exact in float32.

    Args:
        body: the body as the dialect has it.
        opset: 11 or newer.
        common: attributes that have the same value wherever our ops are used. Opset 11 cannot hand a number to a
            function, so there it is written into the body.

    Raises:
        InputError: the body needs something that ``opset`` does not have.
    """
    result = onnx.FunctionProto()
    result.CopyFrom(body)
    for entry in result.opset_import:
        if entry.domain == "":
            entry.version = opset
    if opset < 12:
        _take_width_from_input(result)
    nodes = list(result.node)
    constants = {node.output[0]: node for node in nodes if node.op_type == "Constant"}
    del result.node[:]
    for node in nodes:
        attribute = node.attribute[0].ref_attr_name if node.op_type == "Constant" else ""
        if attribute and opset < 12:
            if attribute not in common:
                raise InputError(
                    f"opset {opset} cannot hold sparse ops with more than one {attribute}; want 12 or newer"
                )
            result.node.append(_constant(node.output[0], common[attribute]))
        else:
            result.node.extend(_older(node, opset, constants))
    for node in result.node:
        if node.domain == "" and not onnx.defs.has(node.op_type, opset, node.domain):
            raise InputError(f"{body.name} needs the ONNX op {node.op_type}, which opset {opset} does not have")
    return result


def _take_width_from_input(body: onnx.FunctionProto) -> None:
    """Replace the attribute ``in_features``, which differs from linear to linear, by the last length of x.

    The ops take x and read it off; what they share takes the number as one more input.
    """
    nodes = list(body.node)
    del body.node[:]
    if body.name in OPS:
        body.node.append(helper.make_node("Shape", ["x"], ["width_all"]))
        body.node.extend([_constant("width_start", [-1]), _constant("width_end", [2**31 - 1])])
        body.node.append(helper.make_node("Slice", ["width_all", "width_start", "width_end"], ["width_last"]))
        body.node.append(helper.make_node("Squeeze", ["width_last"], ["width"], axes=[0]))
    elif WIDTH in body.attribute:
        body.attribute.remove(WIDTH)
        body.input.append("width")
    for node in nodes:
        own = [attribute for attribute in node.attribute if attribute.ref_attr_name == WIDTH]
        if own and node.op_type == "Constant":
            body.node.append(helper.make_node("Identity", ["width"], node.output))
            continue
        body.node.append(node)
        if own:
            remove(body.node[-1].attribute, lambda attribute: attribute.ref_attr_name == WIDTH)
            body.node[-1].input.append("width")


def _older(node: onnx.NodeProto, opset: int, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for op_type, version, rewrite in _REWRITES:
        if node.op_type == op_type and opset < version:
            yield from rewrite(node, constants)
            return
    yield node


def _shape(node: onnx.NodeProto, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    y = node.output[0]
    yield helper.make_node("Shape", node.input, [f"{y}_all"])
    for name, value in (("start", bounds.get("start", 0)), ("end", bounds.get("end", 2**31 - 1))):
        yield _constant(f"{y}_{name}", [value])
    yield helper.make_node("Slice", [f"{y}_all", f"{y}_start", f"{y}_end"], [y])


def _and(node: onnx.NodeProto, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The right-hand side of every BitwiseAnd in our bodies is 2^b - 1, so it asks for the rest of a division."""
    y, (left, right) = node.output[0], node.input
    yield helper.make_node("Cast", [left], [f"{y}_left"], to=INT64)
    yield helper.make_node("Cast", [right], [f"{y}_right"], to=INT64)
    yield _constant(f"{y}_one", [1])
    yield helper.make_node("Add", [f"{y}_right", f"{y}_one"], [f"{y}_span"])
    yield helper.make_node("Mod", [f"{y}_left", f"{y}_span"], [f"{y}_rest"])
    yield helper.make_node("Cast", [f"{y}_rest"], [y], to=onnx.TensorProto.UINT8)


def _axes(node: onnx.NodeProto, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    axes = list(constants[node.input[1]].attribute[0].ints)
    older = helper.make_node(node.op_type, node.input[:1], node.output, axes=axes)
    older.attribute.extend(node.attribute)
    yield older


def _power(node: onnx.NodeProto, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    y = node.output[0]
    for side, name in zip(("base", "exponent"), node.input, strict=True):
        yield helper.make_node("Cast", [name], [f"{y}_{side}"], to=FLOAT)
    yield helper.make_node("Pow", [f"{y}_base", f"{y}_exponent"], [f"{y}_float"])
    yield helper.make_node("Cast", [f"{y}_float"], [y], to=INT64)


def _value(node: onnx.NodeProto, constants: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    attribute = node.attribute[0]
    y = node.output[0]
    if attribute.name == "value":
        yield node
        return
    value = helper.get_attribute_value(attribute)
    kind = FLOAT if attribute.name.startswith("value_float") else INT64
    dims = [] if attribute.name in ("value_int", "value_float") else [len(value)]
    tensor = helper.make_tensor("", kind, dims, value if dims else [value])
    yield helper.make_node("Constant", [], [y], value=tensor)


def _constant(name: str, value: int | list[int]) -> onnx.NodeProto:
    dims, values = ([len(value)], value) if isinstance(value, list) else ([], [value])
    return helper.make_node("Constant", [], [name], value=helper.make_tensor("", INT64, dims, values))


Rewrite = Callable[[onnx.NodeProto, dict[str, onnx.NodeProto]], Iterator[onnx.NodeProto]]
_REWRITES: tuple[tuple[str, int, Rewrite], ...] = (
    ("BitwiseAnd", 18, _and),
    ("Shape", 15, _shape),
    ("ReduceMax", 18, _axes),
    ("ReduceSum", 13, _axes),
    ("Unsqueeze", 13, _axes),
    ("Pow", 12, _power),
    ("Constant", 12, _value),
)
"""Op, the opset that brought the form the bodies use, and how to say it before."""
