"""Experts inside ONNX Runtime with our kernels: the same as every expert's rows alone, and what is refused."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import sparsify_export
import torch
from onnx import TensorProto, helper
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect import experts, packed
from sparsify_export.passes.dialect.storage import Storage

LIBRARY = str(Path(sparsify_export.__file__).with_name("libsparsify_ort.so"))
STORED = [Storage(), Storage("fp16"), Storage("bf16"), Storage("int8"), Storage("int4", 32)]
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int64: TensorProto.INT64,
}
E, N, K = 6, 37, 132


def made(pattern, storage):
    """Experts stored row below row, and a bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E * N, K, generator=generator)
    if isinstance(pattern, NM):
        keep = torch.rand(E * N, K // 4, 4, generator=generator).argsort(-1).lt(2).reshape(E * N, K)
    else:
        keep = torch.rand(E * N, K, generator=generator) < torch.rand(E * N, 1, generator=generator)
    return packed.pack(torch.where(keep, weight, 0.0), pattern, storage), torch.randn(E * N, generator=generator)


def session(op, tensors, attributes, threads=1):
    given = [
        helper.make_tensor(k, TYPES[v.dtype], v.shape, v.contiguous().view(torch.uint8).numpy().tobytes(), raw=True)
        for k, v in tensors.items()
    ]
    node = helper.make_node(op, ["x", "ids", *tensors], ["y"], name="stack", domain="sparsify", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", K])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["t"])
    graph = helper.make_graph(
        [node], "g", [x, ids], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], given
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(LIBRARY)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("storage", STORED, ids=lambda storage: storage.kind)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_every_expert_is_the_linear_of_its_rows_for_any_number_of_threads(pattern, storage):
    """Bit for bit: the kernel gets an expert's tokens together, in their order, whichever threads there are."""
    stored, bias = made(pattern, storage)
    tensors = {**stored.tensors, "bias": bias}
    linear = getattr(torch.ops.sparsify, stored.op)
    sessions = [
        session(experts.PREFIX + stored.op, tensors, {**stored.attributes, "experts": E}, threads) for threads in (1, 2)
    ]
    generator = torch.Generator().manual_seed(1)
    for tokens in (0, 1, 2, 5, 40):
        x = torch.randn(tokens, K, generator=generator)
        ids = torch.randint(0, E - 1, (tokens,), generator=generator)
        x[1::7] = 0.0
        want = bias.reshape(E, N)[ids]
        for expert in range(E):
            mine = (ids == expert) & (x != 0).any(dim=1)
            if bool(mine.any()):
                rows = experts.rows_of(stored.tensors, expert * N, expert * N + N)
                own = bias[expert * N : expert * N + N].contiguous()
                want[mine] = linear(x[mine], *(v.contiguous() for v in rows.values()), own, *stored.attributes.values())
        for ready in sessions:
            (y,) = ready.run(None, {"x": x.numpy(), "ids": ids.numpy()})
            assert np.array_equal(y, want.numpy())


def test_only_the_experts_that_are_asked_are_read():
    """NaN in all others, which a product of zero would not hide; a row of zeros asks for none."""
    stored, bias = made(NM(2, 4), Storage())
    values = torch.full_like(stored.tensors["values"], torch.nan)
    values[2 * N : 3 * N] = stored.tensors["values"][2 * N : 3 * N]
    ready = session(
        "experts_linear_nm",
        {"values": values, "indices": stored.tensors["indices"], "bias": bias},
        {"n": 2, "m": 4, "experts": E},
    )
    x = torch.ones(3, K)
    x[1] = 0.0
    (y,) = ready.run(None, {"x": x.numpy(), "ids": np.array([2, 4, 2])})
    assert np.isfinite(y).all()
    assert np.array_equal(y[1], bias[4 * N : 5 * N].numpy())
    assert np.isnan(ready.run(None, {"x": x.numpy(), "ids": np.array([2, 4, 3])})[0][2]).all()


def test_what_does_not_fit_is_refused_in_a_sentence():
    stored, bias = made(NM(2, 4), Storage())
    tensors, attributes = {**stored.tensors, "bias": bias}, {"n": 2, "m": 4, "experts": E}
    with pytest.raises(Exception, match=r"stack: experts must divide the 222 rows of the weight, got 5"):
        session("experts_linear_nm", tensors, {**attributes, "experts": 5})
    with pytest.raises(Exception, match=r"stack: experts must divide the 222 rows of the weight, got 0"):
        session("experts_linear_nm", tensors, {**attributes, "experts": 0})
    ready = session("experts_linear_nm", tensors, attributes)
    x = np.ones((2, K), np.float32)
    for bad in (-1, E, 1 << 40):
        with pytest.raises(Exception, match=rf"stack: ids must be 0 \.\. 5, got {bad} for row 1"):
            ready.run(None, {"x": x, "ids": np.array([0, bad])})
    with pytest.raises(Exception, match=r"ids must have shape \[2\] as x has rows, got \[3\]"):
        ready.run(None, {"x": x, "ids": np.array([0, 0, 0])})
    with pytest.raises(Exception, match=r"bias must have shape \[222\], got \[37\]"):
        session("experts_linear_nm", {**tensors, "bias": bias[:N]}, attributes).run(
            None, {"x": x, "ids": np.zeros(2, int)}
        )
