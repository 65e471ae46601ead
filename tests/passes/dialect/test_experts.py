"""Experts as one op: torch, and standard ONNX ops, against a plain loop in float64."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect import experts, packed
from sparsify_export.passes.dialect.functions import with_shared
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.equivalence import compare

STORED = [Storage(), Storage("fp16"), Storage("bf16"), Storage("int8"), Storage("int4", 32)]
E, N, K = 5, 6, 68
IDS = torch.tensor([0, 4, 4, 1, 2, 0, 0, 4, 2])  # nobody asks for 3
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int64: TensorProto.INT64,
}


def stacked(pattern, storage, seed=0):
    """Experts stored row below row, and the dense matrices that they are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(E * N, K, generator=generator)
    if isinstance(pattern, NM):
        keep = torch.rand(E * N, K // 4, 4, generator=generator).argsort(-1).lt(2).reshape(E * N, K)
    else:
        keep = torch.rand(E * N, K, generator=generator) < 0.5
    stored = packed.pack(torch.where(keep, weight, 0.0), pattern, storage)
    x = torch.randn(len(IDS), K, generator=generator)
    x[3] = 0.0
    return stored, stored.unpack().reshape(E, N, K), torch.randn(E * N, generator=generator), x


def loop(x, ids, dense, bias, storage):
    """The slow truth in float64, and the same in float32."""
    read = storage.activations(x)
    rows = []
    for dtype in (torch.float64, torch.float32):
        table = bias.reshape(E, N).to(dtype)
        rows.append(
            torch.stack(
                [dense[e].to(dtype) @ row + table[e] for row, e in zip(read.to(dtype), ids.tolist(), strict=True)]
            )
        )
    return rows


def close(got, x, ids, dense, bias, storage):
    exact, plain = loop(x, ids, dense, bias, storage)
    if storage.kind == "bf16":  # kernels may or may not round x: the exact product has it as it is
        exact = loop(x, ids, dense, bias, Storage())[0]
    return compare(got, plain, exact, factor=4.0)


def model(name, stored, bias):
    """One node, its function and what that calls."""
    tensors = {**stored.tensors, "bias": bias}
    given = [
        helper.make_tensor(key, TYPES[value.dtype], value.shape, value.contiguous().view(torch.uint8).numpy(), raw=True)
        for key, value in tensors.items()
    ]
    node = helper.make_node(name, ["x", "ids", *tensors], ["y"], domain="sparsify", experts=E, **stored.attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", K])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["s"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", N])
    graph = helper.make_graph([node], "g", [x, ids], [y], given)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    made.functions.extend(with_shared([experts.OPS[name].FUNCTION, packed.OPS[experts.OPS[name].LINEAR].FUNCTION]))
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("storage", STORED, ids=lambda storage: storage.kind)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_torch_and_standard_ops_are_the_plain_loop(pattern, storage):
    stored, dense, bias, x = stacked(pattern, storage)
    name = experts.PREFIX + stored.op
    run = getattr(torch.ops.sparsify, name)
    got = run(x, IDS, *stored.tensors.values(), bias, *stored.attributes.values(), E)
    assert (result := close(got, x, IDS, dense, bias, storage)).ok, str(result)
    session = onnxruntime.InferenceSession(
        model(name, stored, bias).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for begin, end in [(0, len(IDS)), (1, 3), (3, 4)]:  # all; one expert; zeros alone
        (y,) = session.run(None, {"x": x[begin:end].numpy(), "ids": IDS[begin:end].numpy()})
        result = close(torch.from_numpy(y), x[begin:end], IDS[begin:end], dense, bias, storage)
        assert result.ok, str(result)
    swapped = dense[[1, 0, 2, 3, 4]]  # the check can tell one expert from another
    assert not close(got, x, IDS, swapped, bias, storage).ok


@pytest.mark.parametrize("storage", STORED, ids=lambda storage: storage.kind)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_rows_of_a_stack_are_the_expert_as_it_is_stored_alone(pattern, storage):
    stored, dense, _, _ = stacked(pattern, storage)
    parts = [experts.rows_of(stored.tensors, e * N, e * N + N) for e in range(E)]
    for e, part in enumerate(parts):
        assert torch.equal(packed.Packed(stored.op, part, stored.attributes).unpack(), dense[e])
    again = packed.stack(parts)
    assert all(torch.equal(again[key], stored.tensors[key]) for key in stored.tensors)


def test_zeros_ask_for_no_expert():
    """NaN in an expert shows whether it is read; only rows of zeros ask for it."""
    stored, _, bias, x = stacked(NM(2, 4), Storage())
    stored.tensors["values"][N : 2 * N] = torch.nan  # expert 1, which row 3 asks for, and that is zero
    y = torch.ops.sparsify.experts_linear_nm(x, IDS, *stored.tensors.values(), bias, 2, 4, E)
    assert torch.equal(y[3], bias[N : 2 * N])
    assert bool(y.isfinite().all())


def test_the_schema_is_that_of_the_linear_with_ids_and_a_bias():
    for name, op in experts.OPS.items():
        inputs = [i.name for i in op.SCHEMA.inputs]
        linear = [i.name for i in packed.OPS[op.LINEAR].SCHEMA.inputs]
        assert inputs == ["x", "ids", *linear[1:]]
        assert {*op.SCHEMA.attributes} == {*packed.OPS[op.LINEAR].SCHEMA.attributes, "experts"}
        assert name == f"experts_{op.LINEAR}" == op.FUNCTION.name


def test_dense_experts_are_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    dense, bias = torch.randn(E, N, K, generator=generator), torch.randn(E * N, generator=generator)
    x = torch.randn(len(IDS), K, generator=generator)
    x[3] = 0.0
    got = torch.ops.sparsify.experts(x, IDS, dense, bias)
    assert close(got, x, IDS, dense, bias, Storage()).ok
    tensors = {"weight": dense, "bias": bias}
    given = [
        helper.make_tensor(key, 1, value.shape, value.numpy().tobytes(), raw=True) for key, value in tensors.items()
    ]
    node = helper.make_node("experts", ["x", "ids", *tensors], ["y"], domain="sparsify")
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", K]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["s"]),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", N])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    made = helper.make_model(helper.make_graph([node], "g", values, [y], given), opset_imports=opsets, ir_version=11)
    made.functions.extend(with_shared([experts.DENSE_OP.FUNCTION]))
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy(), "ids": IDS.numpy()})
    assert close(torch.from_numpy(np.asarray(y)), x, IDS, dense, bias, Storage()).ok
