"""Linears whose product is of 8-bit codes, as TensorRT wants them told: QuantizeLinear and DequantizeLinear.

What the parser and the layers behind it take (TensorRT 11.1, include/NvInfer.h: IQuantizeLayer, IDequantizeLayer;
onnx-tensorrt 10.1, QuantDequantLinearHelper): zero points that are constants of zeros, scales above 0; one scale for
activations, and one for every output only where the input is a constant; a float16 scale with float16 data, and
DequantizeLinear gives the type of its scale. So scales are float16 here. A weight is stored as its codes, with no
QuantizeLinear in front. Float8 weights have one scale for all, as Model Optimizer writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...calibrate import grid
from ...calibrate.eight_bit import LARGEST, SMALLEST_SCALE, Kind, codes, rounded
from ..activations import Scaled
from ..dialect.packed import OnGrid
from ..dialect.storage import Storage

TYPES: Mapping[Kind, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Codes:
    """How a linear is quantised.

    Attributes:
        kind: of the codes of its weight and of its activations.
        scale: of what it reads, a positive float16 number.
        scales: of its weight, float16 ``[out_features]`` or ``[1]``, all positive.
    """

    kind: Kind
    scale: float
    scales: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """Activations as the product reads them, in x's dtype."""
        return rounded(x, self.scale, self.kind)

    def of(self, weight: Tensor) -> Tensor:
        """The codes of a weight ``[out_features, in_features]``."""
        return codes(weight, self.scales.float()[:, None], self.kind)

    def value(self, weight: Tensor) -> Tensor:
        """The weight that these codes stand for, float16."""
        return (self.of(weight).float() * self.scales.float()[:, None]).half()


def quantise_weights(
    params: Mapping[str, Tensor], scaled: Sequence[Scaled], kind: Kind, on_grid: Mapping[str, OnGrid]
) -> dict[str, Codes]:
    r"""Choose the scales of the weights of linears whose inputs have one.

    .. math:: t_i = \max_j |W_{ij}| / 127 \qquad t = \max_{ij} |W_{ij}| / 448

    The first for int8, where the pruned weights are not on a grid with scales of its own already; the second for
    float8, over all linears that read the same input, since they become one product.

    Args:
        params: weights ``[out_features, in_features]`` by key.
        scaled: linears by what they read.
        kind: of the codes.
        on_grid: the weights that were quantised before, with float16 scales.

    Returns:
        The codes by key of the weight.
    """
    found: dict[str, Codes] = {}
    for group in scaled:
        keys = [linear.weight for linear in group.linears]
        weights = [params[key].detach().float() for key in keys]
        if kind == "fp8":
            largest = max(float(weight.abs().max()) for weight in weights)
            scales = [torch.tensor([largest / LARGEST[kind]]).half().clamp_min(SMALLEST_SCALE)] * len(keys)
        else:
            scales = [_by_row(weight, on_grid.get(key)) for key, weight in zip(keys, weights, strict=True)]
        found |= {key: Codes(kind, group.scale, each) for key, each in zip(keys, scales, strict=True)}
    return found


def _by_row(weight: Tensor, known: OnGrid | None) -> Tensor:
    """float16 ``[out_features]``; TensorRT wants them positive where a row is all zero, too."""
    its = Storage("int8", half_scales=True).grid
    top = grid.largest(weight, its)
    scales = grid.scales(top, torch.ones_like(top), its)[:, 0] if known is None else known.scales
    return torch.where(scales > 0, scales, 1.0).half()


def joined(quantised: Mapping[str, Codes], merged: Mapping[str, Sequence[str]]) -> dict[str, Codes]:
    """The same after ``merge_linears`` made one of linears that read the same input: rows follow each other."""
    result = dict(quantised)
    for key, parts in merged.items():
        if parts[0] in quantised:
            codes = [result.pop(part) for part in parts]
            first = codes[0]
            scales = first.scales if first.kind == "fp8" else torch.cat([each.scales for each in codes])
            result[key] = Codes(first.kind, first.scale, scales)
    return result


class QuantiseLinears(ir.passes.InPlacePass):
    """Let products be of 8-bit codes.

    Before:  y = MatMul(x, W)                                 W constant, float16 [K, N]
    After:   y = MatMul(x', W')
             x' = DequantizeLinear(QuantizeLinear(x, s), s)   made once for all products of the same x
             W' = DequantizeLinear(codes, t)                  codes constant, int8 or float8 [K, N]; t [N] or one number
    Left alone: every other product, and what else reads x.
    Numerics: W is the value of its codes already, so nothing happens to it; x is rounded to its codes, after a division
              in float32 (attribute ``precision``): from opset 23 on it would be in float16, the type of the scale, and
              one code in a hundred another one (ONNX Runtime 1.32 keeps to that, 1.31 does not).

    Args:
        quantised: how, by the name of the weight.
    """

    def __init__(self, quantised: Mapping[str, Codes]) -> None:
        self._quantised = quantised

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        inputs: dict[tuple[str, float], ir.Value] = {}
        done = set()
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            how = self._quantised.get(weight.name or "")
            if how is None:
                continue
            seen = (x.name or "", how.scale)
            if seen not in inputs:
                inputs[seen] = _round_trip(model, node, x, how)
            node.replace_input_with(0, inputs[seen])
            node.replace_input_with(1, _stored(model, node, weight, how))
            done.add(weight.name)
        assert done == set(self._quantised), f"no product reads {sorted(set(self._quantised) - done)}"
        return ir.passes.PassResult(model, bool(done))


def _round_trip(model: ir.Model, node: ir.Node, x: ir.Value, how: Codes) -> ir.Value:
    scale = _constant(model, f"{x.name}.scale", np.array(how.scale, np.float16))
    zero = _zeros(model, how.kind, ())
    division = [ir.AttrInt64("precision", ir.DataType.FLOAT)]
    quantised = _insert(node, "QuantizeLinear", [x, scale, zero], TYPES[how.kind], x.shape, division)
    return _insert(node, "DequantizeLinear", [quantised, scale, zero], ir.DataType.FLOAT16, x.shape)


def _stored(model: ir.Model, node: ir.Node, weight: ir.Value, how: Codes) -> ir.Value:
    """The codes in the place of the weight, which nothing else reads."""
    name = str(weight.name)
    floats = weight.const_value
    assert floats is not None
    assert floats.dtype == ir.DataType.FLOAT16

    def make() -> ir.TensorProtocol:
        found = how.of(torch.from_numpy(floats.numpy()).T).T.contiguous()
        array = found.view(torch.uint8).numpy().view(np.int8 if how.kind == "int8" else ml_dtypes.float8_e4m3fn)
        return ir.Tensor(array, dtype=TYPES[how.kind], name=f"{name}.codes")

    # Made when it is written, so that the codes of one weight are in memory at a time.
    lazy = ir.LazyTensor(make, TYPES[how.kind], ir.Shape(floats.shape.numpy()), name=f"{name}.codes")
    stored = ir.Value(name=lazy.name, type=ir.TensorType(lazy.dtype), shape=lazy.shape, const_value=lazy)
    model.graph.register_initializer(stored)
    scales = how.scales.numpy() if len(how.scales) > 1 else how.scales.numpy()[0]
    scale = _constant(model, f"{name}.scale", np.asarray(scales))
    zero = _zeros(model, how.kind, np.shape(scales))
    attributes = [ir.AttrInt64("axis", 1)] if np.shape(scales) else []
    return _insert(node, "DequantizeLinear", [stored, scale, zero], ir.DataType.FLOAT16, weight.shape, attributes)


def _zeros(model: ir.Model, kind: Kind, shape: tuple[int, ...]) -> ir.Value:
    """The zero point of a shape; all that have it share it."""
    name = "zero_point." + ".".join([kind, *map(str, shape)])
    dtype = np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn
    return model.graph.initializers.get(name) or _constant(model, name, np.zeros(shape, dtype))


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType,
    shape: ir.Shape | None,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Value:
    """A new op in front of ``node``."""
    output = ir.Value(type=ir.TensorType(dtype), shape=shape)
    assert node.graph is not None
    node.graph.insert_before(node, ir.Node("", op_type, inputs, attributes, outputs=[output]))
    return output
