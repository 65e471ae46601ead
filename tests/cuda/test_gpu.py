"""What only a GPU can show: torch's ops on CUDA tensors, streams, ONNX Runtime's CUDA provider, sizes of real models.

The tests of the kernels beside this file run there as well (`pytest -m gpu tests/cuda`), with the same shapes.
"""

import ctypes
from pathlib import Path

import cuda_gpu
import numpy as np
import onnxruntime
import pytest
import sparsify_export
import torch
from cuda_emulated import HALVES, PAIRS, Output, assert_linear, shifted
from onnx import TensorProto, helper
from packing import onnx_tensor, scattered, sparse_nm
from sparsify_export.calibrate import ranked
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm, linear_nm_int4

TWO_FOUR = NM(2, 4)


@pytest.fixture(scope="module")
def gpu():
    return cuda_gpu.find()


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_gpu(*tensors):
    return [tensor.cuda() for tensor in tensors]


def test_the_way_to_the_gpu_and_back_keeps_alignment_and_sentinels(kernels):
    there = cuda_gpu.GpuKernels(kernels.library, device="cpu")
    x, weight = shifted(normal(3, 40, dtype=torch.float16), 1), scattered(5, 40)
    packed = linear_bitmask.pack(weight, torch.float16)
    assert cuda_gpu.mirror(x, "cpu").data_ptr() % 64 == x.data_ptr() % 64 == 2
    got = there.linear("spmm_bitmask_decode", x, packed, None, 5)
    assert torch.equal(got, kernels.linear("spmm_bitmask_decode", x, packed, None, 5))
    index, y = torch.tensor([4, 0]), Output((3, 2), torch.float16)
    assert torch.equal(there.run("gather_channels", ctypes.c_int32(2), x, index, y, 3, 40, 2), x[:, index])


@pytest.mark.gpu
@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 200])
def test_linears_at_the_size_of_a_model(gpu, types, tokens):
    x, bias = normal(tokens, 2048, dtype=types[0]), normal(1000)
    weight = sparse_nm(1000, 512, TWO_FOUR)
    y = linear_nm.linear_nm(*on_gpu(x, *linear_nm.pack(weight, TWO_FOUR, types[1]), bias), 2, 4)
    assert_linear(y.cpu(), x, weight.to(types[1]).double(), bias)
    weight = scattered(1000, 2048)
    y = linear_bitmask.linear_bitmask(*on_gpu(x, *linear_bitmask.pack(weight, types[1]), bias), 2048)
    assert_linear(y.cpu(), x, weight.to(types[1]).double(), bias)


@pytest.mark.gpu
def test_int4_agrees_with_the_cpu(gpu):
    x, weight = normal(5, 2048), sparse_nm(1000, 512, TWO_FOUR)
    packed = linear_nm_int4.pack(weight, TWO_FOUR, 128)
    y = linear_nm_int4.linear_nm_int4(*on_gpu(x, *packed), None, 2, 4, 128, 2048)
    torch.testing.assert_close(y.cpu(), linear_nm_int4.linear_nm_int4(x, *packed, None, 2, 4, 128, 2048))


@pytest.mark.gpu
@pytest.mark.parametrize("beta_rows", [512, 1])
def test_rate_mask_and_its_gradients_agree_with_the_cpu(gpu, beta_rows):
    weight, grad, rank = normal(512, 3000), normal(512, 3000, seed=1), ranked.ranks(normal(512, 3000, seed=2))
    beta, counts = torch.rand(beta_rows, 101), torch.arange(beta_rows) * 5

    def learn(*tensors):
        weight, grad, rank, beta, counts = tensors
        weight, beta = weight.requires_grad_(), beta.requires_grad_()
        y = ranked.prune(weight, rank, beta, counts)
        y.backward(grad)
        return y.detach().cpu(), weight.grad.cpu(), beta.grad.cpu()

    given = (weight, grad, rank, beta, counts)
    theirs, ours = learn(*on_gpu(*given)), learn(*(t.clone() for t in given))
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
    torch.testing.assert_close(theirs[2], ours[2], rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_the_current_stream_is_used(gpu):
    x, weight = normal(64, 2048, dtype=torch.float16), scattered(1000, 2048)
    packed = on_gpu(*linear_bitmask.pack(weight, torch.float16))
    there, stream = x.cuda(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on another stream would not see y = x' of before
        doubled = there * 2
        y = linear_bitmask.linear_bitmask(doubled, *packed, None, 2048)
    stream.synchronize()
    assert_linear(y.cpu(), x * 2, weight.half().double())


@pytest.mark.gpu
def test_a_captured_graph_can_be_replayed(gpu):
    x, weight = normal(4, 2048, dtype=torch.float16), sparse_nm(1000, 512, TWO_FOUR)
    packed, there = on_gpu(*linear_nm.pack(weight, TWO_FOUR, torch.float16)), x.cuda()
    linear_nm.linear_nm(there, *packed, None, 2, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_nm.linear_nm(there, *packed, None, 2, 4)
    there.copy_(-x)
    graph.replay()
    torch.cuda.synchronize()
    assert_linear(y.cpu(), -x, weight.half().double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pair[0] for pair in HALVES] + [torch.float32])
@pytest.mark.parametrize("op", ["linear_nm", "linear_bitmask"])
def test_onnx_runtimes_cuda_provider(gpu, op, dtype):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    if op == "linear_nm":
        weight, attributes = sparse_nm(1000, 512, TWO_FOUR), {"n": 2, "m": 4}
        tensors = dict(zip(("values", "indices"), linear_nm.pack(weight, TWO_FOUR, dtype), strict=True))
    else:
        weight, attributes = scattered(1000, 2048), {"in_features": 2048}
        tensors = dict(zip(("values", "mask", "row_start"), linear_bitmask.pack(weight, dtype), strict=True))
    node = helper.make_node(op, ["x", *tensors], ["y"], name="up_proj", domain="sparsify", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [onnx_tensor(*item) for item in tensors.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(Path(sparsify_export.__file__).with_name("libsparsify_ort_cuda.so")))
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an error where it is not on the GPU
    ready = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
    given = np.random.default_rng(0).standard_normal((11, 2048), np.float32)
    got = torch.from_numpy(ready.run(None, {"x": given})[0])
    assert_linear(got, torch.from_numpy(given), weight.to(dtype).double())
