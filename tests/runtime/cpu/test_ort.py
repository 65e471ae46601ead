"""The ops inside ONNX Runtime: results, shapes, threads, refusals; and the ABI that is declared by hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import sparsify_export
from onnx import TensorProto, helper
from sparsify_export import _native

LIBRARY = str(Path(sparsify_export.__file__).with_name("libsparsify_ort.so"))
HEADER = Path(__file__).parents[3] / "runtime" / "cpu" / "ort_abi.h"
ONNX_TYPE = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STORED = [("i8", 0), ("i4", 32), ("i4", 128)]


def initializer(name, array, dtype=None):
    kind = ONNX_TYPE[dtype] if dtype else helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


def session(op, initializers, x_shape, threads=1, inputs=(), **attributes):
    """A model of one sparse node whose weights are ``initializers``, in order; ``inputs`` are more graph inputs."""
    names = ["x", *[i.name for i in initializers], *[i.name for i in inputs]]
    node = helper.make_node(op, names, ["y"], name="up_proj", domain="sparsify", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x, *inputs], [y], initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(LIBRARY)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_nm_equals_the_native_kernel(pack, dtype, with_bias):
    rng = np.random.default_rng(0)
    values, indices, _ = pack.nm(rng, 300, 512, 2, 4, dtype)
    bias = rng.standard_normal(300, np.float32) if with_bias else None
    weights = [initializer("v", values, dtype), initializer("i", indices)] + (
        [initializer("b", bias)] if with_bias else []
    )
    for threads in (1, 2):
        ready = session("linear_nm", weights, ["batch", "sequence", 512], threads, n=2, m=4)
        assert ready.get_outputs()[0].shape == ["batch", "sequence", 300]
        for batch, sequence in [(1, 1), (2, 3), (3, 11), (1, 0)]:
            x = rng.standard_normal((batch, sequence, 512), np.float32)
            want = _native.linear_nm(x.reshape(-1, 512), values, indices, 2, 4, bias)
            assert np.array_equal(ready.run(None, {"x": x})[0], want.reshape(batch, sequence, 300))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_bitmask_equals_the_native_kernel(pack, dtype, with_bias):
    rng = np.random.default_rng(0)
    values, mask, row_start, _ = pack.bitmask(rng, rng.random((300, 515)) < 0.5, dtype)
    bias = rng.standard_normal(300, np.float32) if with_bias else None
    weights = [initializer("v", values, dtype), initializer("k", mask), initializer("r", row_start)]
    weights += [initializer("b", bias)] if with_bias else []
    for threads in (1, 2):
        ready = session("linear_bitmask", weights, ["tokens", 515], threads, in_features=515)
        assert ready.get_outputs()[0].shape == ["tokens", 300]
        for tokens in (0, 1, 6, 33):
            x = rng.standard_normal((tokens, 515), np.float32)
            want = _native.linear_bitmask(x, values, mask, row_start, bias)
            assert np.array_equal(ready.run(None, {"x": x})[0], want)


def quantised(op, weight):
    """Name, initializers and attributes of the node, and the name behind which the family's kernel stands."""
    kind = "int8" if weight["values"].dtype == np.int8 else "int4"
    names = ["values", "indices", "scales"] if op == "linear_nm" else ["values", "mask", "row_start", "scales"]
    attributes = {"n": weight["n"], "m": weight["m"]} if op == "linear_nm" else {}
    if kind == "int4":
        attributes["group"] = weight["group"]
    return f"{op}_{kind}", [initializer(name, weight[name]) for name in names], attributes


@pytest.mark.parametrize(("dtype", "group"), STORED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_quantised_ops_equal_the_native_kernels(pack, dtype, group, with_bias):
    rng = np.random.default_rng(0)
    nm, _ = pack.quantised_nm(rng, 300, 516, 2, 4, dtype, group)
    bitmask, _ = pack.quantised_bitmask(rng, rng.random((300, 516)) < 0.5, dtype, group)
    bias = rng.standard_normal(300, np.float32) if with_bias else None
    for op, weight in (("linear_nm", nm), ("linear_bitmask", bitmask)):
        name, weights, attributes = quantised(op, weight)
        if name != "linear_nm_int8":
            attributes["in_features"] = 516
        weights += [initializer("b", bias)] if with_bias else []
        for threads in (1, 2):
            ready = session(name, weights, ["batch", "sequence", 516], threads, **attributes)
            assert ready.get_outputs()[0].shape == ["batch", "sequence", 300]
            for batch, sequence in [(1, 1), (2, 3), (3, 11), (1, 0)]:
                x = rng.standard_normal((batch, sequence, 516), np.float32)
                want = getattr(_native, op)(x.reshape(-1, 516), **weight, bias=bias)
                assert np.array_equal(ready.run(None, {"x": x})[0], want.reshape(batch, sequence, 300))


def test_a_bias_may_be_computed_but_must_fit(pack):
    values, indices, _ = pack.nm(np.random.default_rng(0), 5, 32, 2, 4)
    bias = helper.make_tensor_value_info("b", TensorProto.FLOAT, ["any"])
    weights = [initializer("v", values), initializer("i", indices)]
    ready = session("linear_nm", weights, [2, 32], inputs=[bias], n=2, m=4)
    x, b = np.ones((2, 32), np.float32), np.arange(5, dtype=np.float32)
    assert np.array_equal(ready.run(None, {"x": x, "b": b})[0], _native.linear_nm(x, values, indices, 2, 4, b))
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
        match=r"up_proj: bias must have shape \[5\], got \[4\]",
    ):
        ready.run(None, {"x": x, "b": b[:4]})


def _refused(why, *arguments, **keywords):
    with pytest.raises(Exception, match=why) as caught:
        session(*arguments, **keywords)
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_a_damaged_nm_weight_is_refused_when_the_session_is_made(pack):
    values, indices, _ = pack.nm(np.random.default_rng(0), 5, 32, 2, 4)
    v, i = initializer("v", values), initializer("i", indices)
    short = initializer("i", np.ascontiguousarray(indices[:, 1:]))
    _refused(r"up_proj: indices must have shape \[5, 4\], got \[5, 3\]", "linear_nm", [v, short], [2, 32], n=2, m=4)
    _refused(r"up_proj: n:m must have .* got 0:4", "linear_nm", [v, i], [2, 32], n=0, m=4)
    _refused(r"up_proj: n:m must have .* got 2:-7", "linear_nm", [v, i], [2, 32], n=2, m=-7)
    outside = initializer("i", np.full((5, 4), 255, np.uint8))
    _refused(r"up_proj: indices must be below m = 3, got 3", "linear_nm", [v, outside], [2, 24], n=2, m=3)
    with pytest.raises(Exception, match=r"'n'|name:n|attribute"):
        session("linear_nm", [v, i], [2, 32], m=4)


def test_a_damaged_bitmask_weight_is_refused_when_the_session_is_made(pack):
    rng = np.random.default_rng(0)
    values, mask, row_start, _ = pack.bitmask(rng, rng.random((5, 30)) < 0.5)
    v, k, r = initializer("v", values), initializer("k", mask), initializer("r", row_start)

    def refused(why, *weights, in_features=30):
        _refused(why, "linear_bitmask", weights, [2, 30], in_features=in_features)

    refused("up_proj: row_start must end with the number", initializer("v", values[:-1]), k, r)
    refused("row_start must begin with 0, got 1", v, k, initializer("r", row_start + 1))
    refused(r"row_start\[1\] must be", v, k, initializer("r", row_start[::-1] * 0))
    refused(r"must have shape \[6\], got \[5\]", v, k, initializer("r", row_start[:-1]))
    refused("bits set behind column K = 28 in row", v, k, r, in_features=28)
    refused("mask must have 5 bytes a row for K = 33, got 4", v, k, r, in_features=33)
    refused("in_features must be between 0 and 2147483647, got -1", v, k, r, in_features=-1)
    with pytest.raises(Exception, match=r"in_features|attribute"):
        session("linear_bitmask", [v, k, r], [2, 30])


@pytest.mark.parametrize(("dtype", "group"), STORED[:2])
@pytest.mark.parametrize("op", ["linear_nm", "linear_bitmask"])
def test_a_damaged_quantised_weight_is_refused_when_the_session_is_made(pack, op, dtype, group):
    rng = np.random.default_rng(0)
    if op == "linear_nm":
        weight, _ = pack.quantised_nm(rng, 5, 75, 1, 3, dtype, group)
    else:
        weight, _ = pack.quantised_bitmask(rng, rng.random((5, 75)) < 0.5, dtype, group)

    def refused(why, changed=None, in_features=75, drop=(), **attributes):
        name, weights, found = quantised(op, {**weight, **(changed or {})})
        if name != "linear_nm_int8":
            found["in_features"] = in_features
        found = {key: value for key, value in {**found, **attributes}.items() if key not in drop}
        _refused(why, name, weights, [2, 75], **found)

    scales = weight["scales"]
    nan = scales.copy()
    nan[2] = np.nan
    refused("up_proj: scales must be finite, got an infinity or NaN in row 2", {"scales": nan})
    refused(r"up_proj: scales must have shape \[5.*, got \[4", {"scales": scales[:4]})
    refused("up_proj: ", {"values": np.ascontiguousarray(weight["values"][..., :-1])})
    if dtype == "i4":
        refused("up_proj: group must be 32, 64 or 128, got 0", group=0)
        refused(r"up_proj: scales must have shape \[5, 2\], got \[5, 3\]", group=64)
    if op == "linear_nm":
        refused("up_proj: indices must be below m = 3, got 3", {"indices": weight["indices"] | 0xFF})
        refused(r"up_proj: indices must have shape", {"indices": np.ascontiguousarray(weight["indices"][:, 1:])})
        if dtype == "i4":
            refused("up_proj: in_features must be a multiple of m = 3, got 74", in_features=74)
            refused(r"up_proj: values must have shape \[5, 14\], got \[5, 13\]", in_features=84, group=32)
    else:
        starts = weight["row_start"]
        refused("up_proj: row_start must begin with 0, got 1", {"row_start": starts + 1})
        refused(r"up_proj: row_start\[1\] must be", {"row_start": starts * 0})
        refused("up_proj: mask has bits set behind column K = 73", in_features=73)
        refused("up_proj: mask must have 12 bytes a row for K = 90, got 10", in_features=90, group=group)


def test_weights_that_are_computed_are_refused(pack):
    values, indices, _ = pack.nm(np.random.default_rng(0), 5, 32, 2, 4)
    computed = helper.make_tensor_value_info("i", TensorProto.UINT8, list(indices.shape))
    why = "up_proj: indices must be an initializer, got a computed input"
    _refused(why, "linear_nm", [initializer("v", values)], [2, 32], inputs=[computed], n=2, m=4)


def test_x_of_another_width_is_refused_when_run(pack):
    rng = np.random.default_rng(0)
    values, indices, _ = pack.nm(rng, 5, 32, 2, 4)
    ready = session("linear_nm", [initializer("v", values), initializer("i", indices)], ["t", "k"], n=2, m=4)
    with pytest.raises(Exception, match=r"up_proj: x must have shape \[..., 32\] to match the weight, got \[2, 28\]"):
        ready.run(None, {"x": np.ones((2, 28), np.float32)})
    values, mask, row_start, _ = pack.bitmask(rng, np.ones((5, 30), bool))
    weights = [initializer("v", values), initializer("k", mask), initializer("r", row_start)]
    ready = session("linear_bitmask", weights, ["t", "k"], in_features=30)
    for cols in (28, 33):
        with pytest.raises(Exception, match=rf"up_proj: x must have shape \[..., 30\] .* got \[2, {cols}\]"):
            ready.run(None, {"x": np.ones((2, cols), np.float32)})


def test_an_unknown_instruction_set_is_refused_when_the_library_is_loaded():
    code = f"import onnxruntime as o; o.SessionOptions().register_custom_ops_library({LIBRARY!r})"
    environment = {**os.environ, "SPARSIFY_ISA": "amx3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "SPARSIFY_ISA must be amx, avx512bf16, avx512vnni, avx512, avx2, portable or amx-model" in done.stderr


def test_only_the_entry_point_is_exported():
    done = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "RegisterCustomOps" in names
    assert not {name for name in names if "sparsify" in name.lower()}


def test_slots_are_those_of_the_released_header():
    # Counted in onnxruntime_c_api.h of ORT_API_VERSION 29; the table only ever grows at its end.
    released = {
        "CreateStatus": 0,
        "CreateCustomOpDomain": 26,
        "CustomOpDomain_Add": 27,
        "AddCustomOpDomain": 28,
        "GetTensorMutableData": 51,
        "CreateTensorTypeAndShapeInfo": 57,
        "SetTensorElementType": 58,
        "SetDimensions": 59,
        "GetDimensionsCount": 61,
        "GetDimensions": 62,
        "GetSymbolicDimensions": 63,
        "GetTensorTypeAndShape": 65,
        "KernelInfoGetAttribute_int64": 86,
        "KernelContext_GetInputCount": 88,
        "KernelContext_GetInput": 90,
        "KernelContext_GetOutput": 91,
        "ReleaseStatus": 93,
        "ReleaseTensorTypeAndShapeInfo": 99,
        "KernelContext_GetGPUComputeStream": 193,
        "KernelInfo_GetNodeName": 244,
        "KernelInfoGetConstantInput_tensor": 249,
        "ShapeInferContext_GetInputTypeShape": 268,
        "ShapeInferContext_SetOutputTypeShape": 270,
        "SetSymbolicDimensions": 271,
        "KernelContext_ParallelFor": 274,
    }
    declared = {name: int(number) for name, number in re.findall(r"(\w+)\{(\d+)\};", HEADER.read_text())}
    assert declared == released
