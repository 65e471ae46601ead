"""Shapes that no bytes stand behind, arrays at odd addresses, threads and memory that the system does not give."""

import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import sparsify_export.runtime
from onnx import TensorProto, helper
from sparsify_export import _native

EMPTY = {np.float32: TensorProto.FLOAT, np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}


def open_node(op, weights, folder, attributes, external=()):
    """A session of one sparse node; ``external``: names of weights that lie at odd offsets in a data file."""
    names = ["x", *[w.name for w in weights]]
    node = helper.make_node(op, names, ["y"], name="up_proj", domain="sparsify", **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", None]) for name in "xy")
    data = b"\x00"
    for weight in weights:
        if weight.name in external:
            data += b"\x00" * (len(data) % 2 == 0)
            raw, weight.data_location = weight.raw_data, TensorProto.EXTERNAL
            place = {"location": "w.data", "offset": str(len(data)), "length": str(len(raw))}
            weight.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in place.items())
            weight.ClearField("raw_data")
            data += raw
    (folder / "w.data").write_bytes(data)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sparsify", 1)]
    graph = helper.make_graph([node], "g", [x], [y], weights)
    file = folder / "w.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(sparsify_export.runtime.library_path()))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def tensor(name, array):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


@pytest.mark.parametrize(("rows", "why"), [(2**31 - 1, None), (2**34, "out_features must be between 0 and 2147483647")])
def test_rows_without_bytes_take_no_time(tmp_path, rows, why):
    start = time.perf_counter()
    values, indices = np.empty((rows, 0), np.float32), np.empty((rows, 0), np.uint8)
    weights = [tensor("v", np.empty((rows, 0), np.float32)), tensor("i", indices)]
    if why is None:
        assert _native.unpack_nm(values, indices, 2, 4).shape == (rows, 0)
        assert [a.shape for a in _native.pack_nm(values, 2, 4, "fp32")[:2]] == [(rows, 0), (rows, 0)]
        open_node("linear_nm", weights, tmp_path, {"n": 2, "m": 4})
    else:
        with pytest.raises(ValueError, match=why):
            _native.unpack_nm(values, indices, 2, 4)
        with pytest.raises(ValueError, match=why):
            _native.linear_nm(np.empty((1, 0), np.float32), values, indices, 2, 4)
        with pytest.raises(Exception, match=f"up_proj: {why}"):
            open_node("linear_nm", weights, tmp_path, {"n": 2, "m": 4})
    assert time.perf_counter() - start < 2  # by the rows: a minute


def test_sizes_whose_product_does_not_fit_are_no_small_array():
    x, values = np.empty((2**33, 0), np.float32), np.empty((2**31 - 1, 0), np.float32)
    with pytest.raises(MemoryError):
        _native.linear_nm(x, values, np.empty((2**31 - 1, 0), np.uint8), 2, 4)


def test_in_features_has_one_limit_everywhere(tmp_path):
    """Up to 2**31 - 1, and a file's own number in the sentence: no rows, so no bytes."""

    def weights(cols):
        mask = helper.make_tensor("k", TensorProto.UINT8, [0, -(-cols // 8)], b"", raw=True)
        return [tensor("v", np.empty(0, np.float32)), mask, tensor("r", np.zeros(1, np.int64))]

    open_node("linear_bitmask", weights(1_500_000_000), tmp_path, {"in_features": 1_500_000_000})
    for cols in (2**31, -1, -(2**40)):
        with pytest.raises(Exception, match=f"up_proj: in_features must be between 0 and 2147483647, got {cols}"):
            open_node("linear_bitmask", weights(abs(cols)), tmp_path, {"in_features": cols})


@pytest.mark.parametrize("dtype", ["f32", "i8", "i4"])
def test_data_at_odd_offsets_of_a_file_is_read_right(tmp_path, pack, dtype):
    rng = np.random.default_rng(0)
    keep = rng.random((7, 75)) < 0.5
    x = rng.standard_normal((3, 75)).astype(np.float32)
    if dtype == "f32":
        values, mask, row_start, dense = pack.bitmask(rng, keep)
        weight = {"values": values, "mask": mask, "row_start": row_start}
    else:
        weight, dense = pack.quantised_bitmask(rng, keep, dtype, 32 * (dtype == "i4"))
        x[:, 0] = 127
        x = np.round(x)  # a step of 1: the codes are the activations
    op = {"f32": "linear_bitmask", "i8": "linear_bitmask_int8", "i4": "linear_bitmask_int4"}[dtype]
    group = weight.pop("group", 0)
    attributes = {"in_features": 75} | ({"group": group} if group else {})
    weights = [tensor(name, array) for name, array in weight.items()]
    ready = open_node(op, weights, tmp_path, attributes, external=list(weight))
    for _ in range(2):
        assert ready.run(None, {"x": x})[0] == pytest.approx(x @ dense.T, rel=1e-5, abs=1e-4)


def at_odd_address(array):
    room = np.empty(array.nbytes + 1, np.uint8)
    place = room[1:] if room.ctypes.data % 2 == 0 else room[:-1]
    place[:] = np.frombuffer(array.tobytes(), np.uint8)
    return place.view(array.dtype).reshape(array.shape)


def test_arrays_at_odd_addresses_are_refused_where_elements_are_read(pack):
    rng = np.random.default_rng(0)
    values, mask, row_start, dense = pack.bitmask(rng, rng.random((7, 75)) < 0.5)
    x, bias = np.ones((2, 75), np.float32), np.ones(7, np.float32)
    want = dense.sum(1) + 1
    found = _native.linear_bitmask(x, at_odd_address(values), mask, row_start, bias)
    assert found == pytest.approx(np.stack([want, want]), rel=1e-5, abs=1e-5)
    for change, size in (({"row_start": row_start}, 8), ({"x": x}, 4), ({"bias": bias}, 4)):
        given = {"x": x, "values": values, "mask": mask, "row_start": row_start, "bias": bias}
        ((name, array),) = change.items()
        with pytest.raises(ValueError, match=f"{name} must begin at a multiple of {size} bytes in memory"):
            _native.linear_bitmask(**{**given, name: at_odd_address(array)})
    with pytest.raises(ValueError, match="out must begin at a multiple of 4 bytes"):
        _native.linear_bitmask(x, values, mask, row_start, out=at_odd_address(np.empty((2, 7), np.float32)))
    weight, _ = pack.quantised_bitmask(rng, rng.random((7, 75)) < 0.5, "i8")
    with pytest.raises(ValueError, match="scales must begin at a multiple of their element's size"):
        _native.linear_bitmask(x, **{**weight, "scales": at_odd_address(weight["scales"])})


LITTLE_MEMORY = """
import resource, sys
import numpy as np
from sparsify_export import _native

def leave(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = (pages << 12) + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

values, indices = np.ones((4, 1 << 20), np.float32), np.full((4, 1 << 18), 0b0100_0100, np.uint8)

def done():
    print(_native.unpack_nm(values, indices, 2, 4).sum(dtype=np.int64))
"""

THREADS = """
_native.set_num_threads(64)
leave(100)
try:
    done()
except RuntimeError as error:
    print(error)
leave(1000)
_native.set_num_threads(2)
done()
"""

TASKS = """
_native.set_num_threads(2)
done()
leave(36)
try:
    done()
except MemoryError:
    print("MemoryError")
leave(1000)
done()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process by /proc and setrlimit")
@pytest.mark.parametrize(("code", "said"), [(THREADS, "of 64 threads: Resource temp"), (TASKS, "MemoryError")])
def test_what_the_system_does_not_give_is_an_exception_and_the_next_call_works(code, said):
    done = subprocess.run(
        [sys.executable, "-P", "-c", LITTLE_MEMORY + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    *_, failed, again = done.stdout.splitlines()
    assert said in failed
    assert again == str(4 << 20)
