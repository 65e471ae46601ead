"""The TensorRT plugin against TensorRT's headers: it compiles, and runs on the CPU with the emulated kernels.

The headers are NVIDIA/TensorRT's folder include/, which is not part of this repository: set SPARSIFY_TENSORRT_INCLUDE
to it, or to several of them (10.x and 11.x) with a colon between.
"""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import cuda_emulated
import pytest
import torch
from cuda_emulated import FLAGS, PAIRS, ROOT, Output, assert_linear
from packing import scattered, sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm

HEADERS = [Path(p) for p in os.environ.get("SPARSIFY_TENSORRT_INCLUDE", "").split(os.pathsep) if p]
CUDA_HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
SOURCES = [ROOT / "cuda/tensorrt_plugin.cpp", ROOT / "cuda/tensorrt_register.cpp"]
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.bfloat16: 7, torch.int64: 8}

pytestmark = pytest.mark.skipif(
    not HEADERS, reason="needs TensorRT's headers: set SPARSIFY_TENSORRT_INCLUDE to NVIDIA/TensorRT's folder include/"
)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )

    def __init__(self, tensor):
        super().__init__(NUMBERS[tensor.dtype], tensor.ndim, tuple(tensor.shape), tensor.data_ptr())


class Driver:
    """plugin_driver.cpp."""

    def __init__(self, library):
        for name in ("driver_run", "driver_log", "driver_names"):
            getattr(library, name).restype = ctypes.c_char_p
        self.library = library

    def run(self, op, fields, inputs, y, *, tell_shapes=True):
        """Where it stopped ('' where it did not), what was logged, and the shape that the plugin gave y."""
        names = (ctypes.c_char_p * len(fields))(*(name.encode() for name in fields))
        numbers = (ctypes.c_int32 * len(fields))(*fields.values())
        tensors = (Tensor * len(inputs))(*map(Tensor, inputs))
        out = Tensor(y)
        given = (op.encode(), names, numbers, len(fields), tensors, len(inputs))
        stopped = self.library.driver_run(*given, ctypes.byref(out), tell_shapes)
        return stopped.decode(), self.library.driver_log().decode(), list(out.dims[: out.rank])


@pytest.fixture(scope="module", params=HEADERS, ids=str)
def driver(request, tmp_path_factory):
    kernels = cuda_emulated.build()
    out = tmp_path_factory.mktemp("plugin") / "plugin.so"
    flags = [*FLAGS, "-shared", "-isystem", request.param]
    sources = [SOURCES[0], ROOT / "tests/cuda/plugin_driver.cpp", "-x", "none", kernels.library._name]
    subprocess.run(["c++", *flags, *sources, "-o", out], check=True)
    return Driver(ctypes.CDLL(str(out)))


@pytest.mark.parametrize("headers", HEADERS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_with_the_real_cuda_headers(headers, source, tmp_path):
    if not (CUDA_HEADERS / "cuda_runtime.h").exists():
        pytest.skip(f"needs CUDA's headers, and {CUDA_HEADERS} has none")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", headers, "-isystem", CUDA_HEADERS]
    subprocess.run(["c++", *flags, f"-I{ROOT / 'cuda'}", "-fsyntax-only", source], check=True)


@pytest.fixture(scope="module", params=HEADERS, ids=str)
def host(request, tmp_path_factory):
    """Runs a program that loads the static library by dlopen, with and without a TensorRT in the process."""
    kernels = cuda_emulated.build()
    folder = tmp_path_factory.mktemp("host")
    major = re.search(r"define TRT_MAJOR_ENTERPRISE (\d+)", (request.param / "NvInferVersion.h").read_text())[1]
    flags, shared = [*FLAGS, "-isystem", request.param], ["-shared", "-x", "none", kernels.library._name]
    tensorrt, library = folder / f"libnvinfer.so.{major}", folder / "libsparsify_tensorrt_static.so"
    program, source = folder / "host", ROOT / "tests/cuda/plugin_host.cpp"
    mock = ["-DSPARSIFY_LIBNVINFER", "-Wno-deprecated-declarations", "-shared", f"-Wl,-soname,{tensorrt.name}"]
    subprocess.run(["c++", *flags, *mock, source, "-o", tensorrt], check=True)
    subprocess.run(["c++", *flags, *SOURCES, *shared, "-o", library, "-ldl"], check=True)
    subprocess.run(["c++", *flags, source, "-o", program, "-ldl"], check=True)

    def run(*, with_tensorrt):
        given = [program, library, *([tensorrt] if with_tensorrt else [])]
        return subprocess.run(given, capture_output=True, text=True, check=False)

    return run


def test_a_host_that_only_calls_dlopen_gets_the_plugins(host):
    """trtexec and Triton keep TensorRT's symbols to themselves: RTLD_LAZY | RTLD_LOCAL."""
    done = host(with_tensorrt=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "sparsify::linear_bitmask 1\nsparsify::linear_nm 1\n"


def test_a_host_without_tensorrt_is_told_so_and_lives(host):
    done = host(with_tensorrt=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"sparsify: found no libnvinfer\.so\.1\d .*; load TensorRT before the plugins\n", done.stderr)


def words(packed):
    """The bytes of a tensor as INT32, with zeros up to a whole word."""
    flat = packed.flatten()
    return torch.cat([flat, flat.new_zeros(-len(flat) % 4)]).view(torch.int32)


def problem(op, shape, N, types):
    """Activations, the op's weight inputs, its fields, and the dense weight in float64."""
    generator = torch.Generator().manual_seed(2)
    K = shape[-1]
    x = torch.randn(shape, generator=generator).to(types[0])
    if op == "linear_nm":
        weight = sparse_nm(N, K // 4, NM(2, 4))
        values, indices = linear_nm.pack(weight, NM(2, 4), types[1])
        return x, [values, words(indices)], {"n": 2, "m": 4}, weight.to(types[1]).double()
    weight = scattered(N, K, 0.5)
    values, mask, row_start = linear_bitmask.pack(weight, types[1])
    return x, [values, words(mask), row_start], {"in_features": K}, weight.to(types[1]).double()


@pytest.mark.parametrize("op", ["linear_nm", "linear_bitmask"])
@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("shape", [(3, 36), (2, 9, 64), (1, 1, 1, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_through_its_life(driver, op, types, shape, bias):
    x, weights, fields, dense = problem(op, shape, 7, types)
    add = [torch.randn(7, generator=torch.Generator().manual_seed(3))] if bias else []
    y = Output((*shape[:-1], 7), types[0])
    stopped, log, y_shape = driver.run(op, fields, [x, *weights, *add], y.tensor)
    assert (stopped, log) == ("", "")
    assert y_shape == [*shape[:-1], 7]
    assert_linear(y.checked().reshape(-1, 7), x.reshape(-1, shape[-1]), dense, add[0] if bias else None)


@pytest.mark.parametrize("op", ["linear_nm", "linear_bitmask"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_is_known_from_the_plan(driver, op, bias):
    """Clones and what is read from a plan add it, whatever they are told of shapes."""
    x, weights, fields, dense = problem(op, (3, 36), 7, PAIRS[0])
    add = torch.arange(7.0)
    y = Output((3, 7), torch.float16)
    given = [x, *weights, *([add] if bias else [])]
    assert driver.run(op, fields, given, y.tensor, tell_shapes=False)[:2] == ("", "")
    assert_linear(y.checked(), x, dense, add if bias else None)


def test_names_and_fields(driver):
    names = driver.library.driver_names
    assert names(b"linear_bitmask") == b"sparsify::linear_bitmask 1 in_features"
    assert names(b"linear_nm") == b"sparsify::linear_nm 1 n m"


X = torch.zeros(3, 36, dtype=torch.float16)


def change(**what):
    """An edit of the op's inputs and fields."""
    return lambda inputs, fields: (
        [what.get(f"i{i}", tensor) for i, tensor in enumerate(inputs)] + what.get("more", []),
        what.get("fields", fields),
    )


@pytest.mark.parametrize(
    ("op", "edit", "where", "why"),
    [
        ("linear_bitmask", change(fields={}), "createPlugin", "wants the field in_features with one INT32, got none"),
        ("linear_bitmask", change(fields={"in_features": -1}), "createPlugin", "in_features must not be negative"),
        ("linear_nm", change(fields={"n": 1, "m": 4}), "createPlugin", "have n = 2 with m = 4 only"),
        ("linear_nm", change(fields={"n": 2}), "createPlugin", "wants the field m with one INT32, got none"),
        ("linear_bitmask", change(fields={"in_features": 40}), "configurePlugin", "x must have shape [..., 40]"),
        ("linear_nm", change(i0=X[:, :35]), "configurePlugin", "x must have shape [..., 36] to match the weight"),
        ("linear_nm", change(i0=X[0, 0]), "getOutputShapes", "x must have at least one dimension"),
        ("linear_bitmask", change(i2=X[0, 0].int()), "getOutputShapes", "input 2 must not be a scalar"),
        ("linear_bitmask", change(i2=X[0].int()), "configurePlugin", "mask must have shape [9], words of INT32"),
        ("linear_nm", change(i2=X[0].int()), "configurePlugin", "indices must have shape [9], words of INT32"),
        ("linear_bitmask", change(i1=X), "configurePlugin", "values must have shape [nnz], got [3, 36]"),
        ("linear_nm", change(i1=X[0]), "configurePlugin", "values must have shape [N, K / 2] with K a multiple of 4"),
        ("linear_bitmask", change(more=[X[0, :6].float()]), "configurePlugin", "bias must have shape [7], got [6]"),
        ("linear_bitmask", change(more=[X[0].float()] * 2), "getOutputShapes", "wants 4 inputs, or one more with"),
        ("linear_bitmask", change(i1=X[0].bfloat16()), "supportsFormatCombination", ""),
        ("linear_bitmask", change(i2=X[0].to(torch.int8)), "supportsFormatCombination", ""),
        ("linear_bitmask", change(i3=X[0].int()), "supportsFormatCombination", ""),
        ("linear_bitmask", change(more=[X[0, :7]]), "supportsFormatCombination", ""),
    ],
)  # fmt: skip
def test_refusals(driver, op, edit, where, why):
    x, weights, fields, _ = problem(op, (3, 36), 7, PAIRS[0])
    inputs, fields = edit([x, *weights], fields)
    stopped, log, _ = driver.run(op, fields, inputs, torch.zeros(3, 7, dtype=torch.float16))
    assert stopped == where
    assert why in log
    assert (f"sparsify::{op}" in log) == bool(why)
