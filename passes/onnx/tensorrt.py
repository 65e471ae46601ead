"""What TensorRT's ONNX parser takes: rewrite what it would refuse, and refuse by name what cannot be rewritten.

Source of every rule: the parser's own table, onnx-tensorrt ``docs/operators.md`` as of TensorRT 10.15, the oldest
version that we support.
"""

from collections.abc import Sequence

import onnx_ir as ir

from ..errors import InputError
from .plugin import PLUGINS

_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements
GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
GRU HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool
Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad Pow PRelu
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
ReverseSequence RMSNormalization RNN RoiAlign RotaryEmbedding Round STFT Scan Scatter ScatterElements ScatterND Selu
Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan
Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
DOCUMENTED = frozenset(_NAMES.split())
"""The ops with a Y in that table."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
UNSUPPORTED = {"softcap": 0.0, "qk_matmul_output_mode": 0}
"""Attributes of Attention that the parser does not know, and the values that mean nothing."""


class SuitTensorRT(ir.passes.InPlacePass):
    """Rewrite the ops that TensorRT knows in other types or without some attributes.

    Before:  y = CumSum(x), x integer                     After:  y = Cast(CumSum(Cast(x, float32)))
             y = Clip(x, low, high), x integer                    y = Min(Max(x, low), high)
             y = RMSNormalization(x, scale), other types          y = Cast(RMSNormalization(Cast(x), scale))
             y = Attention(..., softcap=0)                        y = Attention(...)
    Left alone: everything else.
    Numerics: sums of integers are exact in float32 up to 2^24, which no text reaches; the rest is the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        rules = {"CumSum": _cumsum, "Clip": _clip, "RMSNormalization": _norm, "Attention": _attention}
        chosen = [node for node in model.graph if node.domain == "" and node.op_type in rules]
        return ir.passes.PassResult(model, any([rules[node.op_type](node) for node in chosen]))


def check_tensorrt(model: ir.Model) -> None:
    """Refuse a model that TensorRT's parser, with our plugins, would.

    Raises:
        InputError: an op is not in its table, or Attention has what the table excludes.
    """
    for node in model.graph:
        if node.domain == "sparsify" and node.op_type in PLUGINS:
            continue
        if node.domain != "" or node.op_type not in DOCUMENTED:
            op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise InputError(f"TensorRT's documentation does not list the op {op}, which node {node.name} needs")
        if node.op_type == "Attention" and (why := _refused(node)):
            raise InputError(f"TensorRT does not take attention {why}, which node {node.name} needs")


def _refused(node: ir.Node) -> str:
    """What the parser would say about an Attention; "" for nothing."""
    if any(node.inputs[4:]) or len(node.outputs) > 1:
        return "that joins the KV cache itself"
    if given := [name for name in UNSUPPORTED if name in node.attributes]:
        return f"with {given[0]}"
    ranks = [len(value.shape) for value in node.inputs[:4] if value is not None and value.shape is not None]
    return "" if all(rank == 4 for rank in ranks) else "whose inputs do not have 4 axes"


def _cumsum(node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or x.dtype is None or x.dtype in FLOATS:
        return False
    _between_casts(node, ir.DataType.FLOAT)
    return True


def _norm(node: ir.Node) -> bool:
    x, scale = node.inputs[:2]
    if x is None or scale is None or x.dtype == scale.dtype or scale.dtype is None:
        return False
    _between_casts(node, scale.dtype)
    return True


def _clip(node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or x.dtype is None or x.dtype in FLOATS:
        return False
    bounds = [*node.inputs[1:], None, None][:2]
    for op_type, bound in zip(("Max", "Min"), bounds, strict=True):
        if bound is not None:
            x = _insert(node, op_type, [x, bound], like=node.outputs[0])
    _replace(node, x)
    return True


def _attention(node: ir.Node) -> bool:
    found = [a for a, neutral in UNSUPPORTED.items() if a in node.attributes and node.attributes[a].value == neutral]
    for name in found:
        del node.attributes[name]
    return bool(found)


def _between_casts(node: ir.Node, dtype: ir.DataType) -> None:
    """Let a node compute in ``dtype``, between a Cast of its first input and one of its output."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    assert y.dtype is not None
    if x.dtype != dtype:
        node.replace_input_with(0, _insert(node, "Cast", [x], like=x, dtype=dtype))
    inner = ir.Value(type=ir.TensorType(dtype), shape=y.shape)
    new = ir.Node("", node.op_type, node.inputs, node.attributes.values(), outputs=[inner], name=node.name)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    _replace(node, _insert(node, "Cast", [inner], like=y, dtype=y.dtype))


def _insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    like: ir.Value,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """A new op in front of ``node``, its output with the shape of ``like``; with ``dtype`` it is a Cast to that."""
    output = ir.Value(type=like.type if dtype is None else ir.TensorType(dtype), shape=like.shape)
    attributes = [] if dtype is None else [ir.AttrInt64("to", dtype)]
    assert node.graph is not None
    node.graph.insert_before(node, ir.Node("", op_type, inputs, attributes, outputs=[output]))
    return output


def _replace(node: ir.Node, value: ir.Value | None) -> None:
    """Let ``value`` take the place of the only output of ``node``."""
    assert value is not None
    assert node.graph is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
