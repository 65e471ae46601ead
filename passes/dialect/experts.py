"""``sparsify::experts`` and ``sparsify::experts_OP``: many linears of one size, of which each token asks for one.

    y[s] = x[s] W_e^T + b_e,  e = ids[s]        x [S, K] float32,  ids [S] int64,  y [S, N] float32

A token that goes to several experts is in x once for each. There is one op for every OP of the dialect
(``experts_linear_nm``, ``experts_linear_bitmask_int8``, ...), which stores the E experts ``[N, K]`` as OP stores the
one weight ``[E N, K]`` that they are row below row: expert e is rows ``e N`` to ``(e + 1) N``. So tensors and
attributes are those of OP, byte for byte (see its file); every layout of the dialect is a sequence of rows, and a
bitmask's ``row_start`` says where those of an expert lie.

``bias``     [E N]  float32
    Always there; 0 where the model has none.

``experts``  attribute: E. It divides the rows.

Only the experts that tokens ask for are read. A row of x that holds nothing but zeros asks for none: its y is the
bias, whatever its id. Other ids are 0 .. E-1; another one is refused when the op runs.

``experts`` itself has a dense ``weight`` [E, N, K] float32 and is its function: no kernel of ours knows it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import FunctionProto
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from .functions import function
from .packed import OPS as LINEARS
from .packed import TENSORS
from .schema import register_experts

PREFIX = "experts_"
DENSE = "experts"

# What all have in common. `asking` is -1 where a row holds zeros only; every expert that is left is taken once.
_BODY = """
NAME <ATTRIBUTES> (x, ids, STORED, bias) => (y)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    COUNT
    nothing = Constant <value_float = 0.0> ()
    none = Constant <value_int = -1> ()
    zero = Constant <value_int = 0> ()
    always = Constant <value_int = 1> ()
    going = Cast <to = 9> (always)
    all_rows = Shape (bias)
    rows = Div (all_rows, experts1)
    table_shape = Concat <axis = 0> (experts1, rows)
    table = Reshape (bias, table_shape)
    start = Gather (table, ids)
    is_zero = Equal (x, nothing)
    is_some = Not (is_zero)
    some = Cast <to = 1> (is_some)
    most = ReduceMax <keepdims = 0> (some, axis1)
    asks = Cast <to = 9> (most)
    asking = Where (asks, ids, none)
    found = Unique <sorted = 1> (asking)
    is_idle = Less (found, zero)
    is_used = Not (is_idle)
    used = Compress (found, is_used)
    steps = Size (used)
    y = Loop (steps, going, start) <body = one_expert (int64 step, bool on, float[s, n] before)
        => (bool on_after, float[s, n] after)
    {
        expert = Gather (used, step)
        mine = Equal (asking, expert)
        place = NonZero (mine)
        places = Transpose (place)
        token = Squeeze (place, axis0)
        x_mine = Gather (x, token)
        begin = Mul (expert, rows)
        end = Add (begin, rows)
        bias_mine = Slice (bias, begin, end, axis0)
        PART
        after = ScatterND (before, places, y_mine)
        on_after = Identity (on)
    }>
}
"""


def _attributes(name: str) -> list[str]:
    """Those of an op in the order of its arguments; a schema has them by the alphabet."""
    return [a for a in ("n", "m", "group", "in_features") if a in LINEARS[name].SCHEMA.attributes]


def _body(name: str, attributes: Sequence[str], stored: Sequence[str], count: str, part: str) -> FunctionProto:
    text = _BODY.replace("<ATTRIBUTES>", f"<{', '.join(attributes)}>" if attributes else "")
    filled = {"NAME": name, "STORED": ", ".join(stored), "COUNT": count, "PART": part}
    for word, what in filled.items():
        text = text.replace(word, what)
    return function(text)


def _sparse_body(name: str) -> FunctionProto:
    """The body of the op that stores its experts as ``name`` does: it runs the body of that one on rows of it."""
    attributes, stored = _attributes(name), TENSORS[name]
    part = ""
    for key in stored:
        if key == "row_start":
            part += "one = Constant <value_ints = [1]> () behind = Add (end, one) "
            part += "starts = Slice (row_start, begin, behind, axis0) row_start_mine = Sub (starts, first) "
        elif key == "values" and "row_start" in stored:
            part += "first = Gather (row_start, begin) last = Gather (row_start, end) "
            part += "values_mine = Slice (values, first, last, axis0) "
        else:
            part += f"{key}_mine = Slice ({key}, begin, end, axis0) "
    given = ", ".join(f"{key}: int = @{key}" for key in attributes)
    arguments = ", ".join(["x_mine", *(f"{key}_mine" for key in stored), "bias_mine"])
    part += f"y_mine = sparsify.{name} <{given}> ({arguments})"
    count = "experts0 = Constant <value_int: int = @experts> () experts1 = Unsqueeze (experts0, axis0)"
    return _body(PREFIX + name, [*attributes, "experts"], stored, count, part)


@dataclass(frozen=True)
class ExpertsOp:
    """One op of this file, as `packed.OPS` lists those of the others.

    Attributes:
        NAME: ``experts_`` and the op that says how each expert is stored.
        LINEAR: that op.
        FUNCTION: decoding with standard ops, for a runtime without our library; it calls that of ``LINEAR``.
        SCHEMA: as known to ``onnx``.
        to_onnx: the torch op as a node of ONNX.
    """

    NAME: str
    LINEAR: str
    FUNCTION: FunctionProto
    SCHEMA: OpSchema
    to_onnx: Callable[..., object]


def _translation(schema: OpSchema, attributes: Sequence[str]) -> Callable[..., object]:
    """Writes the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""

    def to_onnx(*arguments: object) -> object:
        tensors, numbers = arguments[: len(schema.inputs)], arguments[len(schema.inputs) :]
        return getattr(Opset("sparsify", 1), schema.name)(*tensors, **dict(zip(attributes, numbers, strict=True)))

    # torch.onnx asks a function for the names of its arguments.
    names = [*(i.name for i in schema.inputs), *attributes]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    to_onnx.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    to_onnx.__annotations__ = dict.fromkeys(names, object)
    return to_onnx


def stored_by(name: str) -> tuple[tuple[str, ...], int]:
    """What an op of the dialect stores, in the order of its inputs, and which input is the first of them."""
    return TENSORS[name.removeprefix(PREFIX)], 2 if name.startswith(PREFIX) else 1


def rows_of(tensors: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Rows of a stored weight, as the op would store them alone: what `packed.stack` joins."""
    found = {key: tensor[begin:end] for key, tensor in tensors.items()}
    if "row_start" in tensors:
        starts = tensors["row_start"][begin : end + 1]
        found |= {"row_start": starts - starts[0], "values": tensors["values"][int(starts[0]) : int(starts[-1])]}
    return found


def _define(name: str) -> None:
    """The op in torch: linears on rows of the weight, by the op that stores them."""
    stored, attributes = TENSORS[name], _attributes(name)
    text = ", ".join(["Tensor x", "Tensor ids", *(f"Tensor {key}" for key in stored), "Tensor bias"])
    text += "".join(f", int {key}" for key in [*attributes, "experts"])
    linear = getattr(torch.ops.sparsify, name).default

    def run(x: Tensor, ids: Tensor, *others: Any) -> Tensor:
        tensors, bias = dict(zip(stored, others, strict=False)), others[len(stored)]
        *numbers, experts = others[len(stored) + 1 :]
        rows = len(bias) // experts
        y: Tensor = bias.reshape(experts, rows)[ids]
        asking = torch.where((x != 0).any(dim=1), ids, -1)
        for expert in sorted(set(asking.tolist())):
            if expert >= 0:
                own = range(expert * rows, (expert + 1) * rows)
                packed = rows_of(tensors, own.start, own.stop).values()
                mine = asking == expert
                y[mine] = linear(x[mine], *packed, bias[own.start : own.stop], *numbers)
        return y

    def fake(x: Tensor, ids: Tensor, *others: Any) -> Tensor:
        return x.new_empty(x.shape[0], others[len(stored)].shape[0] // others[-1])

    _define_op(f"{PREFIX}{name}({text}) -> Tensor", run, fake)


def _define_op(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    torch.library.define(f"sparsify::{name}", schema[len(name) :])
    torch.library.impl(f"sparsify::{name}", "cpu", run)
    torch.library.register_fake(f"sparsify::{name}", fake)


def _dense(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = bias.reshape(weight.shape[:2])[ids]
    for expert in sorted(set(ids.tolist())):
        mine = ids == expert
        y[mine] += x[mine] @ weight[expert].mT
    return y


for _name in LINEARS:
    _define(_name)
_define_op(
    f"{DENSE}(Tensor x, Tensor ids, Tensor weight, Tensor bias) -> Tensor",
    _dense,
    lambda x, ids, weight, bias: x.new_empty(x.shape[0], weight.shape[1]),
)


def _op(name: str) -> ExpertsOp:
    schema = register_experts(PREFIX + name, LINEARS[name].SCHEMA)
    attributes = [*_attributes(name), "experts"]
    return ExpertsOp(PREFIX + name, name, _sparse_body(name), schema, _translation(schema, attributes))


OPS = {PREFIX + name: _op(name) for name in LINEARS}
"""The ops with sparse experts by name."""

_DENSE_SCHEMA = register_experts(DENSE, None)
DENSE_OP = ExpertsOp(
    DENSE,
    "",
    _body(
        DENSE,
        [],
        ["weight"],
        "experts1 = Shape <start = 0, end = 1> (weight)",
        "weight_mine = Gather (weight, expert) y_mine = Gemm <transB = 1> (x_mine, weight_mine, bias_mine)",
    ),
    _DENSE_SCHEMA,
    _translation(_DENSE_SCHEMA, []),
)
