"""The nodes of TensorRT's plugin: words of a mask by hand and by property, and the names that the C++ source has."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.passes.dialect import linear_bitmask, linear_nm
from sparsify_export.passes.onnx.plugin import (
    BIAS,
    BITMASK,
    LIBRARY,
    PACKED,
    TWO_FOUR,
    SuitPlugin,
    from_words,
    to_words,
)
from sparsify_export.runtime.tensorrt import __file__ as package

ROOT = Path(__file__).parents[3]


def test_words_by_hand():
    mask = np.array([[0x01, 0x02], [0x03, 0x80], [0xFF, 0x00]], np.uint8)
    words = to_words(mask)
    assert words.dtype == np.int32
    assert words.tolist() == [-0x7FFCFDFF, 0xFF]  # 0x80030201 as a signed number; the first byte is the lowest
    assert to_words(np.zeros((0, 4), np.uint8)).shape == (0,)


@given(st.integers(0, 6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_words_hold_every_byte(rows, columns, random):
    width = -(-columns // 8)
    mask = np.array([random.randrange(256) for _ in range(rows * width)], np.uint8).reshape(rows, width)
    words = to_words(mask)
    assert len(words) == -(-mask.size // 4)
    np.testing.assert_array_equal(from_words(words, rows, columns), mask)


def test_words_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"3 x 16 weights have 2 words, got \(3,\)"):
        from_words(np.zeros(3, np.int32), 3, 16)


def constant(name, array):
    return ir.Value(name=name, const_value=ir.Tensor(array, name=name))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("op", [BITMASK, TWO_FOUR])
def test_the_node_gets_what_the_plugin_takes(op, with_bias):
    packed = np.array([[0x05], [0x0A]], np.uint8)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1, 4]))
    weights = [constant("v", np.ones(4, np.float16)), constant("m", packed)]
    weights += [constant("r", np.array([0, 2, 4]))] if op == BITMASK else []
    attributes = {"in_features": 4} if op == BITMASK else {"n": 2, "m": 4}
    bias = constant("b", np.array([0.5, -0.25], np.float16)) if with_bias else None
    nodes = [
        ir.Node("sparsify", op, [x, *weights, bias], [ir.AttrInt64(*item) for item in attributes.items()])
        for _ in range(2)
    ]
    outputs = [node.outputs[0] for node in nodes]
    held = [*weights, *([bias] if bias else [])]
    model = ir.Model(ir.Graph([x], outputs, nodes=nodes, initializers=held, opset_imports={"": 23}), ir_version=10)
    assert SuitPlugin()(model).modified
    for node in nodes:
        assert len(node.inputs) == BIAS[op] + with_bias
        assert node.inputs[1] is weights[0]
        assert node.inputs[3:][: len(weights) - 2] == tuple(weights[2:])
        words = node.inputs[PACKED].const_value.numpy()
        assert (words.dtype, words.tolist()) == (np.int32, [0x0A05])
        if with_bias:
            wide = node.inputs[BIAS[op]].const_value.numpy()
            assert (wide.dtype, wide.tolist()) == (np.float32, [0.5, -0.25])
    assert nodes[0].inputs[PACKED] is nodes[1].inputs[PACKED]  # a shared weight stays shared


def test_names_are_those_of_the_plugins():
    source = (ROOT / "cuda" / "tensorrt_plugin.cpp").read_text()
    begins = [source.index(name) for name in ("struct Bitmask", "struct TwoFour", "class SparseLinear")]
    script = Path(package).with_name("build_plan.py").read_text()
    for op, schema, begin, end in zip(
        (BITMASK, TWO_FOUR), (linear_bitmask, linear_nm), begins, begins[1:], strict=False
    ):
        found = re.search(r"kFields = \{([^}]*)\}", source[begin:end])
        assert set(re.findall(r'"(\w+)"', found[1])) == set(schema.SCHEMA.attributes)
        assert f'kName[] = "{op}"' in source[begin:end]
        assert f"kWeights = {BIAS[op] - 1};" in source[begin:end]
    for name, ours in (("kNamespace", "sparsify"), ("kVersion", "1")):
        assert f'{name}[] = "{ours}"' in source
    assert 'NAMESPACE, VERSION = "sparsify", "1"' in script
    assert f'LIBRARY = "{LIBRARY}"' in script
    assert f"// {LIBRARY}" in source
