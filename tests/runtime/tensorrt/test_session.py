"""Running an engine: a double of TensorRT, whose engine is ONNX Runtime behind the addresses that it is given."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sparsify_export.passes.errors import InputError, NotBuiltError
from sparsify_export.runtime.artifact import artifact_file, causal, open_artifact
from sparsify_export.runtime.evaluate import onnx_logits, perplexity
from sparsify_export.runtime.feeds import NUMPY
from sparsify_export.runtime.generate import generate
from sparsify_export.runtime.session import CausalSession, open_session
from sparsify_export.runtime.tensorrt import session as engines
from trt_double import Double

RANGES = {
    "input_ids": ([1, 1], [1, 16]),
    "attention_mask": ([1, 1], [1, 32]),
    "past_key_values.0.key": ([1, 1, 0, 8], [1, 1, 16, 8]),
    "past_key_values.0.value": ([1, 1, 0, 8], [1, 1, 16, 8]),
}
"""For prompts; decoding takes one token after up to 31."""


class Context:
    """What an execution context has been told, and what ONNX Runtime computes from it."""

    def __init__(self, session):
        self.session = session
        self.shapes, self.addresses, self.results = {}, {}, {}

    def infer_shapes(self):
        feed = {}
        for value in self.session.get_inputs():
            if value.name not in self.shapes:
                return [value.name]
            dtype = np.dtype(NUMPY[value.type])
            count = int(np.prod(self.shapes[value.name]))
            assert self.addresses[value.name] != 0
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[value.name])
            feed[value.name] = np.frombuffer(memory, dtype).reshape(self.shapes[value.name])
        names = [value.name for value in self.session.get_outputs()]
        self.results = dict(zip(names, self.session.run(names, feed), strict=True))
        return []

    def execute(self):
        for name, array in self.results.items():
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


@pytest.fixture
def plan(surface, tiny, tmp_path, monkeypatch):
    """A file that is an engine to the double of TensorRT, and the double."""
    session = open_session(tiny.path)
    inputs = {value.name: value for value in session.get_inputs()}
    values = {**inputs, **{value.name: value for value in session.get_outputs()}}
    contexts = {}

    def context(self):
        return contexts.setdefault(id(self), Context(session))

    def sizes(self, name):
        return [size if isinstance(size, int) else -1 for size in values[name].shape]

    def profile(self, name, index):
        least, most = RANGES[name]
        if index and name != "attention_mask":
            most = [1, 1] if name == "input_ids" else [1, 1, 31, 8]
        return [least, least, most]

    double = Double(surface, {})
    floats = {"tensor(float)": double.DataType.FLOAT, "tensor(int64)": double.DataType.INT64}
    mode = double.TensorIOMode
    double.script |= {
        "ICudaEngine.num_optimization_profiles": 2,
        "ICudaEngine.num_io_tensors": len(values),
        "ICudaEngine.get_device_memory_size_for_profile_v2": lambda self, index: [4096, 512][index],
        "ICudaEngine.get_tensor_name": lambda self, index: list(values)[index],
        "ICudaEngine.get_tensor_mode": lambda self, name: mode.INPUT if name in inputs else mode.OUTPUT,
        "ICudaEngine.get_tensor_dtype": lambda self, name: floats[values[name].type],
        "ICudaEngine.get_tensor_shape": sizes,
        "ICudaEngine.get_tensor_profile_shape": profile,
        "IExecutionContext.set_input_shape": lambda self, n, shape: context(self).shapes.update({n: shape}) is None,
        "IExecutionContext.set_tensor_address": lambda self, n, at: context(self).addresses.update({n: at}) is None,
        "IExecutionContext.infer_shapes": lambda self: context(self).infer_shapes(),
        "IExecutionContext.get_tensor_shape": lambda self, name: context(self).results[name].shape,
        "IExecutionContext.execute_async_v3": lambda self, stream: context(self).execute(),
    }
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.delitem(sys.modules, "sparsify_export.runtime.tensorrt.build_plan", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(engines, "DEVICE", "cpu")
    file = tmp_path / "model.plan"
    file.write_bytes(b"engine")
    yield SimpleNamespace(path=file, double=double, onnx=tiny.path)
    sys.modules.pop("sparsify_export.runtime.tensorrt.build_plan", None)  # it holds the double


def test_text_and_perplexity_are_those_of_the_onnx_file(plan):
    engine, onnx = causal(open_artifact(plan.path)), CausalSession(open_session(plan.onnx))
    prompts = [[1, 2, 3, 4]]
    assert generate(engine, prompts, max_new_tokens=8).tokens == generate(onnx, prompts, max_new_tokens=8).tokens
    windows = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    wanted = perplexity(onnx_logits(onnx), windows).mean_nll
    assert perplexity(onnx_logits(engine), windows).mean_nll == pytest.approx(wanted, rel=1e-6)
    engine.run_only(np.array([[1]]), np.ones((1, 6), np.int64), engine.random_past(1, 5))
    assert engine.session.get_inputs()[0].shape == (None, None)


def test_plugins_beside_an_engine_are_loaded_before_it(plan):
    library = plan.path.with_name("libsparsify_tensorrt.so")
    library.write_bytes(b"")
    known = []
    plan.double.script |= {
        "get_plugin_registry": lambda: plan.double.value("IPluginRegistry"),
        "IPluginRegistry.load_library": lambda self, plugin_path: known.append(plugin_path) or "handle",
        "IPluginRegistry.get_creator": lambda self, name, version, space: known or None,
    }
    open_artifact(plan.path)
    order = [name for name, _ in plan.double.calls]
    assert order.index("IPluginRegistry.load_library") < order.index("Runtime.deserialize_cuda_engine")
    open_artifact(plan.path)
    assert known == [str(library)]  # once
    # One that cannot be loaded matters only to an engine that needs it.
    known.clear()
    plan.double.script["IPluginRegistry.load_library"] = lambda self, plugin_path: None
    open_artifact(plan.path)
    plan.double.script["Runtime.deserialize_cuda_engine"] = lambda *_: None
    with pytest.raises(InputError, match=r"not an engine .*TensorRT cannot load .*libsparsify_tensorrt\.so"):
        open_artifact(plan.path)


def test_the_plugins_of_tensorrt_are_there_before_the_engine_is_read(plan):
    open_artifact(plan.path)
    order = [name for name, _ in plan.double.calls]
    assert order.index("init_libnvinfer_plugins") < order.index("Runtime.deserialize_cuda_engine")


def test_warnings_go_to_the_log(plan, caplog):
    def read(self, content):
        log = plan.double.called("Runtime")[-1][0]
        log.log(plan.double.ILogger.WARNING, "built by another GPU")
        return plan.double.value("ICudaEngine")

    plan.double.script["Runtime.deserialize_cuda_engine"] = read
    open_artifact(plan.path)
    assert [record.getMessage() for record in caplog.records] == ["TensorRT: built by another GPU"]


def test_every_call_uses_the_stream_and_the_narrowest_profile(plan):
    engine = causal(open_artifact(plan.path))
    assert [at for at, _ in plan.double.called("IExecutionContext.set_optimization_profile_async")] == [0, 1]
    contexts = [id(context) for context in engine.session._contexts]
    used = []
    run = plan.double.script["IExecutionContext.execute_async_v3"]
    plan.double.script["IExecutionContext.execute_async_v3"] = lambda self, stream: (
        used.append(id(self)) or run(self, stream)
    )
    generate(engine, [[1, 2, 3, 4]], max_new_tokens=3)
    assert used == [contexts[0], contexts[1], contexts[1]]
    assert set(plan.double.called("IExecutionContext.execute_async_v3")) == {(7,)}


@pytest.mark.parametrize(("past", "tokens", "runs"), [(0, 17, 2), (0, 31, 2), (0, 32, 2), (3, 20, 2), (20, 5, 5)])
def test_longer_prompts_are_read_in_pieces(plan, past, tokens, runs):
    engine, onnx = causal(open_artifact(plan.path)), CausalSession(open_session(plan.onnx))
    ids = np.arange(past + tokens)[None] % 13 + 1
    mask = np.ones_like(ids)
    cached = engine.step(ids[:, :past], mask[:, :past], engine.empty_past(1))[1] if past else engine.empty_past(1)
    before = len(plan.double.called("IExecutionContext.execute_async_v3"))
    logits, present = engine.step(ids[:, past:], mask, cached)
    assert len(plan.double.called("IExecutionContext.execute_async_v3")) - before == runs
    wanted, theirs = onnx.step(ids, mask, onnx.empty_past(1))
    np.testing.assert_allclose(logits, wanted[:, past:], rtol=1e-4, atol=1e-5)
    for mine, other in zip(present, theirs, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-4, atol=1e-5)


def test_all_contexts_share_the_memory_of_the_largest_profile(plan):
    session = open_artifact(plan.path)
    managed = plan.double.ExecutionContextAllocationStrategy.USER_MANAGED
    assert plan.double.called("ICudaEngine.create_execution_context") == [(managed,)] * 2
    (first, size), second = plan.double.called("IExecutionContext.set_device_memory")
    assert (first, size) == second == (session._activations.data_ptr(), 4096)
    assert session._activations.nbytes == 4096


def test_what_the_engine_was_not_built_for_is_refused(plan):
    engine = causal(open_artifact(plan.path))
    with pytest.raises(InputError, match=r"not built for past_key_values.0.key \[1, 1, 17, 8\]"):
        generate(engine, [[1 + i % 13 for i in range(33)]], max_new_tokens=1)
    with pytest.raises(InputError, match=r"not built for .*input_ids \[2, 3\]"):
        generate(engine, [[1, 2, 3], [4, 5, 6]], max_new_tokens=1)


def test_arrays_in_and_arrays_out(plan):
    session, onnx = open_artifact(plan.path), open_session(plan.onnx)
    past = np.zeros((1, 1, 0, 8), np.float32)
    feed = {"past_key_values.0.key": past, "past_key_values.0.value": past}
    feed |= {"input_ids": np.array([[3, 4]]), "attention_mask": np.ones((1, 2), np.int64)}
    for mine, theirs in zip(session.run(None, feed), onnx.run(None, feed), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    with pytest.raises(InputError, match="the engine wants attention_mask too"):
        session.run(None, {name: array for name, array in feed.items() if name != "attention_mask"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Runtime.deserialize_cuda_engine", lambda *_: None, "is not an engine of this TensorRT and GPU"),
        ("IExecutionContext.set_optimization_profile_async", False, "cannot be run on this GPU"),
        ("ICudaEngine.create_execution_context", lambda *_: None, "cannot be run on this GPU"),
    ],
)
def test_what_tensorrt_refuses_is_said(plan, name, value, said):
    plan.double.script[name] = value
    with pytest.raises(InputError, match=said):
        open_artifact(plan.path)


def test_a_failure_while_running_is_said(plan):
    engine = causal(open_artifact(plan.path))
    plan.double.script["IExecutionContext.execute_async_v3"] = False
    with pytest.raises(InputError, match="the engine failed"):
        generate(engine, [[1]], max_new_tokens=1)


def test_without_tensorrt_or_without_a_gpu(tmp_path, monkeypatch):
    file = tmp_path / "model.plan"
    with pytest.raises(InputError, match=r"model\.plan does not exist"):
        open_artifact(file)
    file.write_bytes(b"engine")
    assert artifact_file(file) == file
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(NotBuiltError, match=r"TensorRT is not installed here; it wants TensorRT 10\.15"):
        open_artifact(file)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: no such file')")
    with pytest.raises(NotBuiltError, match=r"TensorRT cannot be imported here \(libnvinfer\.so\.11: no such file\)"):
        open_artifact(file)
    done = subprocess.run(
        [sys.executable, engines.__file__.replace("session", "build_plan")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "TensorRT cannot be imported here (libnvinfer.so.11: no such file); building" in done.stderr
    monkeypatch.setattr(engines, "import_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotBuiltError, match="torch sees no NVIDIA GPU here"):
        open_artifact(file)
