"""The bitmask layout byte for byte, and its ONNX function run without our library."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sparsify_export.passes.dialect import linear_bitmask
from sparsify_export.passes.equivalence import compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sparse(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(weight.shape, generator=generator) < density, weight, 0.0)


def slow_unpack(values: torch.Tensor, mask: torch.Tensor, row_start: torch.Tensor, columns: int) -> torch.Tensor:
    """The layout as the docstring says it, one bit at a time."""
    dense = torch.zeros(len(mask), columns, dtype=values.dtype)
    for row in range(len(mask)):
        line = iter(values[row_start[row] : row_start[row + 1]])
        for k in range(columns):
            if int(mask[row, k // 8]) >> (k % 8) & 1:
                dense[row, k] = next(line)
        assert next(line, None) is None
    assert row_start[-1] == len(values)
    return dense


def test_the_example_of_the_docstring():
    a, c, e = 1.0, 2.0, 3.0
    values, mask, row_start = linear_bitmask.pack(torch.tensor([[a, 0, c, 0, e]]), torch.float32)
    assert values.tolist() == [a, c, e]
    assert mask.tolist() == [[0b000_10101]]
    assert row_start.tolist() == [0, 3]
    assert (values.dtype, mask.dtype, row_start.dtype) == (torch.float32, torch.uint8, torch.int64)


def test_columns_behind_a_byte_and_empty_rows_by_hand():
    weight = torch.zeros(4, 10)
    weight[1, 7], weight[1, 8], weight[3, 9] = 5, 6, 7
    values, mask, row_start = linear_bitmask.pack(weight, torch.float32)
    assert values.tolist() == [5, 6, 7]
    assert mask.tolist() == [[0, 0], [0x80, 0x01], [0, 0], [0, 0x02]]
    assert row_start.tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_never_stored(dtype):
    below = -torch.finfo(torch.float32).smallest_normal / 2**20  # rounds to zero in 16 bits
    values, mask, _ = linear_bitmask.pack(torch.tensor([[-0.0, 1.0, below]]), dtype)
    assert mask.tolist() == [[0b110]]
    assert not torch.signbit(values[values == 0]).any()


def test_refuses_a_number_that_the_storage_cannot_hold():
    weight = torch.tensor([[1.0, -70000.0, 0.0]])
    with pytest.raises(ValueError, match=r"-70000 does not fit float16, which ends at 65504"):
        linear_bitmask.pack(weight, torch.float16)
    assert linear_bitmask.pack(weight, torch.bfloat16)[0].isfinite().all()


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_unpack_inverts_pack_and_both_follow_the_layout(rows, columns, density, seed, dtype):
    weight = sparse(rows, columns, density, seed).to(dtype)
    values, mask, row_start = linear_bitmask.pack(weight, dtype)
    assert torch.equal(linear_bitmask.unpack(values, mask, columns), weight)
    assert torch.equal(slow_unpack(values, mask, row_start, columns), weight)
    size = sum(t.numel() * t.element_size() for t in (values, mask, row_start))
    assert size == linear_bitmask.packed_bytes(rows, columns, len(values), dtype)


EDGES = {
    "half": sparse(7, 24),
    "no values at all": torch.zeros(3, 8),
    "full": sparse(3, 16, 1.0),
    "columns not a multiple of 8": sparse(5, 13),
    "fewer than 8 columns": sparse(5, 3),
    "empty rows first and last": torch.cat([torch.zeros(2, 9), sparse(2, 9), torch.zeros(1, 9)]),
    "one weight": torch.tensor([[2.0]]),
}


def session(packed: tuple[torch.Tensor, ...], bias: torch.Tensor | None, rank: int) -> ort.InferenceSession:
    """One node and its function body in a bare ONNX Runtime, nothing optimised away."""
    values, mask, row_start = packed
    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    tensors = [
        helper.make_tensor("values", kinds[values.dtype], values.shape, raw, raw=True),
        numpy_helper.from_array(mask.numpy(), "mask"),
        numpy_helper.from_array(row_start.numpy(), "row_start"),
    ]
    names = ["x", "values", "mask", "row_start"]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias.numpy(), "bias"))
        names.append("bias")
    graph = helper.make_graph(
        [helper.make_node("linear_bitmask", names, ["y"], domain="sparsify")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[linear_bitmask.FUNCTION])
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(features: int, rank: int) -> torch.Tensor:
    return torch.randn((2, 3, features)[3 - rank :], generator=torch.Generator().manual_seed(9))


def assert_equals_reference(got, x, packed, bias):
    baseline = linear_bitmask.reference(x, *packed, bias)
    exact = linear_bitmask.reference(x.double(), *packed, None if bias is None else bias.double())
    close = compare(got, baseline, exact)
    assert close.ok, close


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("edge", EDGES)
def test_function_body_alone_equals_the_reference(edge, with_bias, rank):
    weight = EDGES[edge]
    packed = linear_bitmask.pack(weight, torch.float32)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(3)) if with_bias else None
    x = inputs(weight.shape[1], rank)
    (got,) = session(packed, bias, rank).run(None, {"x": x.numpy()})
    assert_equals_reference(torch.from_numpy(got), x, packed, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_function_body_reads_every_storage(dtype):
    packed = linear_bitmask.pack(sparse(5, 12), dtype)
    x = inputs(12, 3)
    (got,) = session(packed, None, 3).run(None, {"x": x.numpy()})
    assert_equals_reference(torch.from_numpy(got), x, packed, None)


def test_function_body_of_an_all_zero_weight_gives_the_bias():
    bias = torch.tensor([1.0, -2.0, 0.5])
    (got,) = session(linear_bitmask.pack(torch.zeros(3, 8), torch.float32), bias, 2).run(
        None, {"x": inputs(8, 2).numpy()}
    )
    assert np.array_equal(got, bias.expand(3, 3).numpy())


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_op_equals_the_reference(dtype, edge):
    weight = EDGES[edge]
    packed = linear_bitmask.pack(weight, dtype)
    for bias in (None, torch.arange(float(len(weight)))):
        for x in (inputs(weight.shape[1], 3), inputs(weight.shape[1], 2)[0]):
            got = torch.ops.sparsify.linear_bitmask(x, *packed, bias)
            assert got.shape == (*x.shape[:-1], len(weight))
            assert_equals_reference(got, x, packed, bias)


def test_torch_op_takes_no_rows_and_strided_rows():
    packed = linear_bitmask.pack(sparse(6, 8), torch.float32)
    assert torch.ops.sparsify.linear_bitmask(torch.zeros(0, 3, 8), *packed, None).shape == (0, 3, 6)
    x = inputs(8, 3).transpose(0, 1)
    assert not x.is_contiguous()
    assert_equals_reference(torch.ops.sparsify.linear_bitmask(x, *packed, None), x, packed, None)


def test_torch_op_keeps_its_promises():
    packed = linear_bitmask.pack(sparse(6, 8), torch.float32)
    for bias in (None, torch.zeros(6)):
        torch.library.opcheck(
            torch.ops.sparsify.linear_bitmask.default,
            (inputs(8, 3), *packed, bias),
            test_utils=("test_schema", "test_faketensor"),
        )
