"""The N:M layout byte for byte, and its ONNX function run without our library."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from reference import nm_keep_mask
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm
from sparsify_export.passes.equivalence import compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = [NM(1, 2), NM(2, 4), NM(3, 4), NM(3, 5), NM(5, 8), NM(4, 16), NM(3, 17), NM(20, 32)]


def sparse(rows: int, groups: int, nm: NM, seed: int = 0, dead: float = 0.0) -> torch.Tensor:
    """A random N:M weight; the fraction ``dead`` of its kept places is zero as well."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * nm.m, generator=generator)
    keep = nm_keep_mask(weight.abs(), nm.n, nm.m)
    keep &= torch.rand(weight.shape, generator=generator) >= dead
    return torch.where(keep, weight, 0.0)


def slow_unpack(values: torch.Tensor, indices: torch.Tensor, nm: NM) -> torch.Tensor:
    """The layout as the docstring says it, one bit field at a time."""
    bits = 1 if nm.m == 2 else 2 if nm.m <= 4 else 4 if nm.m <= 16 else 8
    rows, kept = values.shape
    dense = torch.zeros(rows, kept // nm.n * nm.m, dtype=values.dtype)
    for row in range(rows):
        for i in range(kept):
            byte = int(indices[row, i * bits // 8])
            position = byte >> (i * bits % 8) & (2**bits - 1)
            dense[row, i // nm.n * nm.m + position] = values[row, i]
    return dense


def test_the_example_of_the_docstring():
    a, d, f, g = 1.0, 2.0, 3.0, 4.0
    values, indices = linear_nm.pack(torch.tensor([[a, 0, 0, d, 0, f, g, 0]]), NM(2, 4), torch.float32)
    assert values.tolist() == [[a, d, f, g]]
    assert indices.tolist() == [[0b10_01_11_00]]
    assert (values.dtype, indices.dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize(
    ("nm", "row", "wanted"),
    [
        (NM(1, 2), [0, 5, 6, 0, 0, 7], [0b1_0_1]),
        (NM(3, 4), [5, 0, 6, 7], [0b11_10_00]),
        (NM(2, 8), [0, 0, 0, 5, 0, 0, 0, 6], [0x73]),
        (NM(3, 5), [0, 5, 6, 0, 7], [0x21, 0x04]),
        (NM(1, 17), [0] * 16 + [5], [16]),
    ],
)
def test_indices_by_hand(nm, row, wanted):
    values, indices = linear_nm.pack(torch.tensor([row], dtype=torch.float32), nm, torch.float32)
    assert values.tolist() == [[v for v in row if v]]
    assert indices.tolist() == [wanted]


def test_every_row_starts_on_a_byte():
    weight = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 4]])
    assert linear_nm.pack(weight, NM(2, 4), torch.float32)[1].tolist() == [[0b11_01], [0b11_00]]


def test_spare_slots_are_plus_zero_at_the_lowest_free_positions():
    weight = torch.tensor([[0, 0, 0, 7.0, 0, 0, 0, 0, 0, 8.0, 0, 0]])
    values, indices = linear_nm.pack(weight, NM(2, 4), torch.float32)
    assert values.tolist() == [[0, 7, 0, 0, 0, 8]]
    assert indices.tolist() == [[0b01_00_11_00, 0b01_00]]
    assert not torch.signbit(values).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_never_stored(dtype):
    below = -torch.finfo(torch.float32).smallest_normal / 2**20  # rounds to zero in 16 bits
    weight = torch.tensor([[-0.0, 1.0, -0.0, -0.0, below, -0.0, 2.0, -0.0]])
    values, _ = linear_nm.pack(weight, NM(2, 4), dtype)
    assert not torch.signbit(values[values == 0]).any()


def test_refuses_a_number_that_the_storage_cannot_hold():
    weight = torch.tensor([[1.0, 70000.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"70000 does not fit float16"):
        linear_nm.pack(weight, NM(2, 4), torch.float16)
    assert linear_nm.pack(weight, NM(2, 4), torch.bfloat16)[0].isfinite().all()


@settings(max_examples=60)
@given(
    st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_unpack_inverts_pack_and_both_follow_the_layout(nm, rows, groups, dead, seed, dtype):
    pattern = NM(*nm)
    weight = sparse(rows, groups, pattern, seed, dead).to(dtype)
    values, indices = linear_nm.pack(weight, pattern, dtype)
    assert torch.equal(linear_nm.unpack(values, indices, pattern), weight)
    assert torch.equal(slow_unpack(values, indices, pattern), weight)
    size = values.numel() * dtype.itemsize + indices.numel()
    assert size == linear_nm.packed_bytes(*weight.shape, pattern, dtype)


def test_refuses_what_is_not_the_pattern():
    with pytest.raises(ValueError, match="a group of 4 holds 3 non-zeros, at most 2 can be packed as 2:4"):
        linear_nm.pack(torch.tensor([[1.0, 1, 1, 0]]), NM(2, 4), torch.float32)
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of the group length 4"):
        linear_nm.pack(torch.zeros(2, 6), NM(2, 4), torch.float32)


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (32, 8)])
def test_index_bits(m, bits):
    assert linear_nm.index_bits(m) == bits


def session(nm: NM, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None, rank: int):
    """One node and its function body in a bare ONNX Runtime, nothing optimised away."""
    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    tensors = [
        helper.make_tensor("values", kinds[values.dtype], values.shape, raw, raw=True),
        numpy_helper.from_array(indices.numpy(), "indices"),
    ]
    names = ["x", "values", "indices"]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias.numpy(), "bias"))
        names.append("bias")
    graph = helper.make_graph(
        [helper.make_node("linear_nm", names, ["y"], domain="sparsify", n=nm.n, m=nm.m)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[linear_nm.FUNCTION])
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(features: int, rank: int) -> torch.Tensor:
    return torch.randn((2, 3, features)[3 - rank :], generator=torch.Generator().manual_seed(9))


def assert_equals_reference(got, x, values, indices, bias, nm):
    baseline = linear_nm.reference(x, values, indices, bias, nm)
    exact = linear_nm.reference(x.double(), values, indices, None if bias is None else bias.double(), nm)
    close = compare(got, baseline, exact)
    assert close.ok, close


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("nm", PATTERNS, ids=str)
def test_function_body_alone_equals_the_reference(nm, with_bias, rank):
    values, indices = linear_nm.pack(sparse(7, 3, nm, dead=0.2), nm, torch.float32)
    bias = torch.randn(7, generator=torch.Generator().manual_seed(3)) if with_bias else None
    x = inputs(3 * nm.m, rank)
    (got,) = session(nm, values, indices, bias, rank).run(None, {"x": x.numpy()})
    assert_equals_reference(torch.from_numpy(got), x, values, indices, bias, nm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_function_body_reads_every_storage(dtype):
    nm = NM(2, 4)
    values, indices = linear_nm.pack(sparse(5, 3, nm), nm, dtype)
    x = inputs(12, 3)
    (got,) = session(nm, values, indices, None, 3).run(None, {"x": x.numpy()})
    assert_equals_reference(torch.from_numpy(got), x, values, indices, None, nm)


def test_function_body_of_an_all_zero_weight_gives_the_bias():
    values, indices = linear_nm.pack(torch.zeros(3, 8), NM(2, 4), torch.float32)
    bias = torch.tensor([1.0, -2.0, 0.5])
    (got,) = session(NM(2, 4), values, indices, bias, 2).run(None, {"x": inputs(8, 2).numpy()})
    assert np.array_equal(got, bias.expand(3, 3).numpy())


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_op_equals_the_reference(dtype, with_bias):
    nm = NM(2, 4)
    values, indices = linear_nm.pack(sparse(6, 5, nm), nm, dtype)
    bias = torch.arange(6.0) if with_bias else None
    for rank in (1, 2, 3):
        x = inputs(20, max(rank, 2))
        x = x[0] if rank == 1 else x
        got = torch.ops.sparsify.linear_nm(x, values, indices, bias, 2, 4)
        assert got.shape == (*x.shape[:-1], 6)
        assert_equals_reference(got, x, values, indices, bias, nm)


def test_torch_op_takes_no_rows_and_strided_rows():
    nm = NM(2, 4)
    values, indices = linear_nm.pack(sparse(6, 2, nm), nm, torch.float32)
    assert torch.ops.sparsify.linear_nm(torch.zeros(0, 3, 8), values, indices, None, 2, 4).shape == (0, 3, 6)
    x = inputs(8, 3).transpose(0, 1)
    assert not x.is_contiguous()
    got = torch.ops.sparsify.linear_nm(x, values, indices, None, 2, 4)
    assert_equals_reference(got, x, values, indices, None, nm)


def test_torch_op_keeps_its_promises():
    values, indices = linear_nm.pack(sparse(6, 2, NM(2, 4)), NM(2, 4), torch.float32)
    for bias in (None, torch.zeros(6)):
        arguments = (inputs(8, 3), values, indices, bias, 2, 4)
        torch.library.opcheck(
            torch.ops.sparsify.linear_nm.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
