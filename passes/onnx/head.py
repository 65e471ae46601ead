"""Which linear gives a model's output, by what lies between the two."""

import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from .linears import Linear
from .view import STANDARD, Model

_SHAPES = """
    Cast CastLike Concat DepthToSpace DequantizeLinear Expand Flatten Gather GatherElements GatherND Identity Pad
    QuantizeLinear Reshape Shape Size Slice SpaceToDepth Split SplitToSequence Squeeze Tile Transpose Unsqueeze
"""
_POINTWISE = "Abs Add Clip Div Equal Exp Greater Less Log Max Min Mul Neg Not Pow Round Sqrt Sub Where"
_CHOICES = """
    ArgMax ArgMin ArrayFeatureExtractor Hardmax LabelEncoder LogSoftmax LpNormalization NonMaxSuppression Normalizer
    ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Sigmoid Softmax Tanh TopK ZipMap
"""
MOVES = frozenset(_SHAPES.split()) | frozenset(_CHOICES.split())
"""Ops that move numbers or round them, or make probabilities, choices or unit vectors of them."""
POINTWISE = frozenset(_POINTWISE.split())
"""Ops on one number of the linear's and constants; the activations that layers have between them are not among them."""


def gives_output(model: Model, linear: Linear) -> bool:
    """Whether all that is made of a linear's result is an output of the model, but for shape and pointwise work.

    A linear that something else reads as well (the keys that a cache keeps and an attention reads) does not, nor one
    whose result meets another computed one (a residual).
    """
    owners = _owners(model)
    outputs = {tensor.name for tensor in model.views[0].outputs}
    tensors, seen, reached = [linear.y], set[str](), False
    while tensors:
        tensor = tensors.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        reached |= tensor.name in outputs
        if tensor.name in owners:
            after = owners[tensor.name]
            if after is None:
                return False
            tensors.append(after)
        for node in tensor.outputs:
            if not _follows(model, node, tensor):
                return False
            tensors += node.outputs
    return reached


def _follows(model: Model, node: gs.Node, tensor: gs.Tensor) -> bool:
    if (node.domain or "") not in (*STANDARD, "ai.onnx.ml"):
        return False
    if node.op in POINTWISE:
        return all(x is tensor or _constant(model, x) for x in node.inputs if x.name)
    return node.op in MOVES


def _constant(model: Model, tensor: gs.Tensor) -> bool:
    """Whether a tensor is computed from nothing but constants."""
    tensors = [tensor]
    while tensors:
        x = tensors.pop()
        if x.name in model.constants:
            continue
        if not x.inputs or not x.inputs[0].inputs:
            return bool(x.inputs) and x.inputs[0].op == "Constant"
        tensors += [made for made in x.inputs[0].inputs if made.name]
    return True


def _owners(model: Model) -> dict[str, gs.Tensor | None]:
    """By each output of an If's branch: what the If calls it. None for those of loops, which go round."""
    owners: dict[str, gs.Tensor | None] = {}
    for node in model.nodes():
        for body in node.attrs.values():
            if isinstance(body, gs.Graph):
                for index, tensor in enumerate(body.outputs):
                    owners[tensor.name] = node.outputs[index] if node.op == "If" else None
    return owners
