"""Inputs from files fit the model or are refused; inputs that are made up fit what it declares."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx_models import build, dense, node, saved
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.feeds import make_feed, make_feed_that_runs, read_feeds, try_feed
from sparsify_export.runtime.session import open_session


def session(tmp_path, **inputs):
    """A model that takes ``name=(type, shape)`` and returns its first input."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    first = values[0].name
    out = helper.make_tensor_value_info("y", inputs[first][0], None)
    graph = helper.make_graph([helper.make_node("Identity", [first], ["y"])], "g", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ort.InferenceSession(str(saved(model, tmp_path)), providers=["CPUExecutionProvider"])


IDS, REAL, HALF, FLAG = TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL


def test_a_causal_model_gets_an_empty_cache_and_a_full_mask(tmp_path):
    ready = session(
        tmp_path,
        input_ids=(IDS, ["batch_size", "sequence_length"]),
        attention_mask=(IDS, ["batch_size", "total_sequence_length"]),
        sum_mask=(IDS, ["batch_size", "past_sequence_length + sequence_length"]),
        past=(REAL, ["batch_size", 2, "past_sequence_length", "head"]),
    )
    feed = make_feed(ready, {"input_ids": 5}, {"head": 8}, seed=0)
    assert {name: array.shape for name, array in feed.items()} == {
        "input_ids": (1, 16),
        "attention_mask": (1, 16),
        "sum_mask": (1, 16),
        "past": (1, 2, 0, 8),
    }
    assert feed["input_ids"].max() < 5
    assert len(set(feed["input_ids"][0].tolist())) > 1
    assert feed["attention_mask"].min() == feed["attention_mask"].max() == 1


def test_pictures_halves_flags_and_nameless_axes(tmp_path):
    ready = session(
        tmp_path, p=(REAL, ["n", 3, "height", "width"]), h=(HALF, [None, 4]), f=(FLAG, [2]), step=(IDS, ["past + 1"])
    )
    feed = make_feed(ready, {}, {}, seed=0)
    assert [feed[name].shape for name in ("p", "h", "f", "step")] == [(1, 3, 224, 224), (1, 4), (2,), (1,)]
    assert [feed[name].dtype for name in ("p", "h", "f")] == [np.float32, np.float16, np.bool_]


def test_files_are_read_in_order_in_the_types_of_the_model(tmp_path):
    ready = session(tmp_path, x=(HALF, ["b", 4]), past=(REAL, ["b", 2, "past", 8]))
    for name in ("b", "a"):
        np.savez(tmp_path / f"{name}.npz", x=np.full((3, 4), ord(name), np.float64))
    feeds = read_feeds(tmp_path, ready, {}, samples=None)
    assert [feed["x"][0, 0] for feed in feeds] == [ord("a"), ord("b")]
    assert feeds[0]["x"].dtype == np.float16
    assert feeds[0]["past"].shape == (3, 2, 0, 8)
    assert len(read_feeds(tmp_path, ready, {}, samples=1)) == 1


def test_refusals(tmp_path):
    ready = session(tmp_path, x=(REAL, ["b", 4]), z=(IDS, [1]))
    with pytest.raises(InputError, match=r"holds no \.npz file"):
        read_feeds(tmp_path, ready, {}, samples=None)
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"a\.npz lacks z; it holds x"):
        read_feeds(tmp_path, ready, {}, samples=None)
    with pytest.raises(InputError, match=r"cannot run the model on it: .*Got: 5 Expected: 4"):
        try_feed(ready, {"x": np.zeros((3, 5), np.float32), "z": np.zeros(1, np.int64)}, "it")
    words = session(tmp_path, s=(TensorProto.STRING, [1]))
    with pytest.raises(InputError, match=r"input s is a tensor\(string\)"):
        make_feed(words, {}, {}, seed=0)


def test_a_picture_is_made_as_large_as_the_model_takes_it(tmp_path):
    """Text in pictures: 48 high, whatever the file declares."""
    nodes = [node("Reshape", ["x", "shape"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    weights = {"shape": np.array([-1, 3 * 48]), "w": dense(3 * 48, 8)}
    path = saved(build(nodes, {"x": ["batch", 3, "?", 5]}, ["y"], weights), tmp_path)
    feed = make_feed_that_runs(open_session(path), {}, {}, seed=0)
    assert feed["x"].shape == (1, 3, 48, 5)
    never = build([node("Reshape", ["x", "s"], ["y"])], {"x": [1, 3, "?", 5]}, ["y"], {"s": np.array([7])})
    never = saved(never, tmp_path, "never.onnx")
    with pytest.raises(InputError, match="give --calibration-inputs FOLDER"):
        make_feed_that_runs(open_session(never), {}, {}, seed=0)
