"""Our ops as nodes of TensorRT plugins, ``linear_bitmask`` and ``linear_nm`` (2:4) of cuda/tensorrt_plugin.cpp.

TensorRT's plugins know no UINT8 and take the bias in float32, so two inputs differ from those of our ops:

    mask or indices   uint8 [N, ceil(K / 8)]             ->  int32 [ceil(N ceil(K / 8) / 4)], the same bytes in order
    bias              [N] of x's type, or an empty input ->  [N] float32, or no input

x and y may be float16 or bfloat16 here. TensorRT's parser finds a plugin by the op's name and, from 10.10 on, takes its
namespace from the node's domain (release notes of TensorRT 10.10); the version is 1 where the node names none.
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

BITMASK, TWO_FOUR = "linear_bitmask", "linear_nm"
PLUGINS = (BITMASK, TWO_FOUR)
LIBRARY = "libsparsify_tensorrt.so"
"""Holds the plugin; build_plan.py, which stands alone, calls it so as well."""

VALUES, PACKED, ROW_START = 1, 2, 3
"""Places of the inputs; the mask or the indices are packed."""

BIAS = {BITMASK: 4, TWO_FOUR: 3}


def to_words(packed: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The bytes of a mask or of indices as 32-bit words, the first byte the lowest; zeros fill up the last.

    Args:
        packed: ``[N, ceil(K / 8)]`` uint8.

    Returns:
        ``[ceil(N ceil(K / 8) / 4)]`` int32.
    """
    padded = np.pad(packed.reshape(-1), (0, -packed.size % 4))
    return padded.view("<i4")


def from_words(words: NDArray[np.int32], rows: int, columns: int) -> NDArray[np.uint8]:
    """The bytes ``[rows, ceil(columns / 8)]`` of such words: the inverse of ``to_words``.

    Raises:
        ValueError: there are more or fewer words than such weights have.
    """
    width = math.ceil(columns / 8)
    size = rows * width
    if words.shape != (math.ceil(size / 4),):
        raise ValueError(f"{rows} x {columns} weights have {math.ceil(size / 4)} words, got {words.shape}")
    return words.astype("<i4").view(np.uint8)[:size].reshape(rows, width)


class SuitPlugin(ir.passes.InPlacePass):
    """Give our ops the inputs that their plugins take.

    Before:  y = sparsify.linear_bitmask(x, values, mask, row_start, bias)    mask uint8, bias of x's type or empty
             y = sparsify.linear_nm(x, values, indices, bias)                 the same of indices
    After:   y = sparsify.linear_bitmask(x, values, words, row_start, bias)   words int32, bias float32 or absent
             y = sparsify.linear_nm(x, values, words, bias)
    Left alone: everything else; x, values and row starts are the same tensors.
    Numerics: none change; the bias is widened.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        made: dict[str, ir.Value] = {}
        chosen = [node for node in model.graph if node.domain == "sparsify" and node.op_type in PLUGINS]
        for node in chosen:
            packed, place = _constant(node, PACKED), BIAS[node.op_type]
            words = _initializer(model, made, f"{packed.name}.words", to_words(packed.numpy()))
            node.replace_input_with(PACKED, words)
            if len(node.inputs) > place and node.inputs[place] is None:
                node.resize_inputs(place)
            elif len(node.inputs) > place:
                bias = _constant(node, place)
                wide = bias.numpy().astype(np.float32)
                node.replace_input_with(place, _initializer(model, made, f"{bias.name}.float32", wide))
        return ir.passes.PassResult(model, bool(chosen))


def _constant(node: ir.Node, place: int) -> ir.TensorProtocol:
    value = node.inputs[place]
    assert value is not None
    assert value.const_value is not None, f"{node.name}: {value.name} is not stored in the file"
    return value.const_value


def _initializer(model: ir.Model, made: dict[str, ir.Value], name: str, array: NDArray[Any]) -> ir.Value:
    """A new constant of the file; linears that share what it is made from share it."""
    if name not in made:
        tensor = ir.Tensor(array, name=name)
        made[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        model.graph.register_initializer(made[name])
    return made[name]
