"""Which linears may run by sparse tactics, by hand, and the float32 twin of a bfloat16 file."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from sparsify_export.passes.errors import VerificationError
from sparsify_export.runtime.tensorrt.linears import eligibility, plan_linears
from sparsify_export.runtime.tensorrt.twin import write_twin

FP16 = {"bits": 16, "two_of_four": True}
CODES = {"bits": 8, "two_of_four": True}
NOT_SURE = "TensorRT may run a product between Q and DQ dense (NVIDIA/TensorRT#4694)"


@pytest.mark.parametrize(
    ("k", "n", "how", "found"),
    [
        (256, 256, FP16, ("yes", "")),
        (576, 960, FP16, ("yes", "")),
        (192, 256, FP16, ("maybe", "K = 192 is below 256, where sparse tactics rarely win")),
        (256, 224, FP16, ("maybe", "N = 224 is below 256, where sparse tactics rarely win")),
        (64, 32, FP16, ("maybe", "K = 64 is below 256, where sparse tactics rarely win")),
        (272, 256, FP16, ("maybe", "K = 272 is not a multiple of 64")),
        (256, 264, FP16, ("maybe", "N = 264 is not a multiple of 32")),
        (100, 32, FP16, ("no", "K = 100 is not a multiple of 16")),
        (64, 33, FP16, ("no", "N = 33 is not a multiple of 8")),
        (64, 32, {**FP16, "bits": 32}, ("no", "2:4 tensor cores need 16 bits or less")),
        (64, 32, {**FP16, "two_of_four": False}, ("no", "the weight is not 2:4")),
        (64, 32, CODES, ("maybe", NOT_SURE)),
        (576, 960, CODES, ("maybe", NOT_SURE)),
        (48, 32, CODES, ("no", "K = 48 is not a multiple of 32")),
        (64, 24, CODES, ("no", "N = 24 is not a multiple of 32")),
        (64, 32, {**CODES, "two_of_four": False}, ("no", "the weight is not 2:4")),
    ],
)
def test_by_shape_dtype_and_pattern(k, n, how, found):
    assert eligibility(k, n, **how) == found


def file(folder, weight):
    kind = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    values = [onnx.helper.make_tensor_value_info(n, kind, ["B", s]) for n, s in zip("xy", weight.shape, strict=True)]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.up")
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weight, "w")])
    path = folder / "model.trt.onnx"
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 23)])
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    return path


def two_of_four(dtype):
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(dtype)
    weight.reshape(16, 4, 32)[:, 1:3] = 0  # along K, which is the first axis of a MatMul's weight
    return weight


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_pattern_is_looked_for_along_k(tmp_path, dtype):
    (found,) = plan_linears(file(tmp_path, two_of_four(dtype)))
    assert (found.name, found.k, found.n, found.pattern, found.eligible) == ("layers.0.up", 64, 32, "2:4", "maybe")
    (found,) = plan_linears(file(tmp_path, np.ascontiguousarray(two_of_four(dtype)[:32].T)))
    assert (found.k, found.n, found.eligible) == (32, 32, "no")


def test_a_sparser_pattern_fits_too_and_a_wider_one_does_not(tmp_path):
    weight = two_of_four(np.float16)
    weight.reshape(16, 4, 32)[:, 0] = 0
    assert plan_linears(file(tmp_path, weight))[0].pattern == "2:4"  # 1:4
    wide = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float16)
    wide.reshape(8, 8, 32)[:, :4] = 0
    (found,) = plan_linears(file(tmp_path, wide))
    assert (found.pattern, found.eligible) == ("4:8", "no")


def test_a_negative_zero_is_found(tmp_path):
    weight = two_of_four(np.float16)
    weight[1, 1] = -0.0
    with pytest.raises(VerificationError, match=r"layers\.0\.up holds -0\.0"):
        plan_linears(file(tmp_path, weight))


def test_a_bfloat16_file_has_a_float32_twin_that_runs(tmp_path):
    weight = two_of_four(ml_dtypes.bfloat16)
    write_twin(file(tmp_path, weight), tmp_path / "twin.onnx")
    onnx.checker.check_model(str(tmp_path / "twin.onnx"), full_check=True)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    got = ort.InferenceSession(str(tmp_path / "twin.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ weight.astype(np.float32), rtol=1e-5, atol=1e-5)
