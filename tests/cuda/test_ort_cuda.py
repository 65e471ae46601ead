"""The ops for ONNX Runtime's CUDA provider, built for its CPU provider with the emulated kernels in their place."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cuda_emulated import FLAGS, ROOT, assert_linear
from onnx import TensorProto, helper
from packing import onnx_tensor, scattered, sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SOURCES = [ROOT / "cuda/ort_cuda_ops.cpp", ROOT / "runtime/cpu/formats.cpp"]


def compiled(kernels, name, *more):
    """Compiled once, beside the emulated kernels."""
    kernels_at = Path(kernels.library._name)
    library = kernels_at.parent / f"{name}.so"
    if not library.exists():
        part = kernels_at.parent / f"part-{os.getpid()}-{name}.so"
        flags = [*FLAGS, "-O0", "-fvisibility=hidden", "-DSPARSIFY_EMULATED", *more, "-shared"]
        everything = [*SOURCES, "-x", "none", kernels_at, "-Wl,-z,defs", "-o", part]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *everything], check=True)
        part.rename(library)
    return library


@pytest.fixture(scope="module")
def library(kernels):
    return compiled(kernels, "ort")


def session(library, op, tensors, x_shape, **attributes):
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    node = helper.make_node(op, ["x", *tensors], ["y"], name="up_proj", domain="sparsify", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], [onnx_tensor(*item) for item in tensors.items()])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def two_four(dtype):
    weight = sparse_nm(9, 20, NM(2, 4))
    values, indices = linear_nm.pack(weight, NM(2, 4), dtype)
    return weight, {"values": values, "indices": indices}, {"n": 2, "m": 4}


def bitmask(dtype):
    weight = scattered(9, 80)
    values, mask, row_start = linear_bitmask.pack(weight, dtype)
    return weight, {"values": values, "mask": mask, "row_start": row_start}, {"in_features": 80}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "make"), [("linear_nm", two_four), ("linear_bitmask", bitmask)])
@pytest.mark.parametrize("bias", [None, torch.arange(9.0)])
def test_results_and_shapes(library, op, make, dtype, bias):
    weight, tensors, attributes = make(dtype)
    ready = session(library, op, {**tensors, "bias": bias}, ["batch", "sequence", 80], **attributes)
    assert ready.get_outputs()[0].shape == ["batch", "sequence", 9]
    for batch, sequence in [(1, 1), (2, 7), (3, 0)]:
        x = np.random.default_rng(0).standard_normal((batch, sequence, 80), np.float32)
        (y,) = ready.run(None, {"x": x})
        assert y.shape == (batch, sequence, 9)
        dense = weight.to(dtype).double()
        assert_linear(torch.from_numpy(y).reshape(-1, 9), torch.from_numpy(x).reshape(-1, 80), dense, bias)


def test_refusals_when_the_session_is_made(library):
    def refused(why, op, tensors, **attributes):
        with pytest.raises(Exception, match=why):
            session(library, op, tensors, ["t", 80], **attributes)

    _, tensors, _ = two_four(torch.float16)
    refused("up_proj: the GPU kernels have n = 2 with m = 4, got n = 1 and m = 2", "linear_nm", tensors, n=1, m=2)
    damaged = {**tensors, "indices": tensors["indices"] * 0}
    refused("up_proj: indices must ascend inside a group", "linear_nm", damaged, n=2, m=4)
    _, tensors, _ = bitmask(torch.float16)
    damaged = {**tensors, "row_start": tensors["row_start"] + 1}
    refused("up_proj: row_start must begin with 0, got 1", "linear_bitmask", damaged, in_features=80)
    refused("up_proj: mask must have 9 bytes a row for K = 72, got 10", "linear_bitmask", tensors, in_features=72)


def test_x_and_bias_of_other_sizes_are_refused_when_run(library):
    _, tensors, attributes = bitmask(torch.float16)
    ready = session(library, "linear_bitmask", {**tensors, "bias": torch.ones(8)}, ["t", "k"], **attributes)
    with pytest.raises(Exception, match=r"up_proj: x must have shape \[..., 80\] to match the weight, got \[2, 79\]"):
        ready.run(None, {"x": np.ones((2, 79), np.float32)})
    with pytest.raises(Exception, match=r"up_proj: bias must have shape \[9\], got \[8\]"):
        ready.run(None, {"x": np.ones((2, 80), np.float32)})


@pytest.mark.parametrize(("op", "make"), [("linear_nm", two_four), ("linear_bitmask", bitmask)])
def test_no_stream_is_refused_and_not_taken_for_the_legacy_one(kernels, op, make):
    """As on a GPU, with a provider that has none."""
    _, tensors, attributes = make(torch.float16)
    ready = session(compiled(kernels, "ort_stream", "-DSPARSIFY_WANTS_STREAM"), op, tensors, ["t", 80], **attributes)
    with pytest.raises(Exception, match="up_proj: ONNX Runtime gave no CUDA stream to run on"):
        ready.run(None, {"x": np.ones((2, 80), np.float32)})
