"""Norms of what linears read: against numpy, in chunks, without padding."""

import numpy as np
import pytest
import torch
from onnx_models import build, dense, mlp, node, rng, saved
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime import observe_onnx
from sparsify_export.runtime.observe_onnx import observe


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_norms_are_those_of_numpy_whatever_fits_at_once(tmp_path, monkeypatch, budget):
    first, second = dense(16, 8, 1), dense(8, 4, 2)
    proto = mlp(first, second)
    path = saved(proto, tmp_path)
    chunks = []
    whole = observe_onnx._with_outputs
    monkeypatch.setattr(observe_onnx, "_with_outputs", lambda p, names: chunks.append(list(names)) or whole(p, names))
    feeds = [{"x": rng(i).standard_normal((5, 16)).astype(np.float32)} for i in range(3)]
    seen = observe(path, {"x": 16, "r0": 8, "r1": 4}, feeds, budget=budget)
    assert chunks == ([["x"], ["r0"], ["r1"]] if budget == 1 else [["x"], ["r0", "r1"]])
    x = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    bias = rng(100).standard_normal(8).astype(np.float32)
    hidden = np.maximum(x @ first + bias, 0)
    for name, values in (("x", x), ("r0", hidden)):
        exact = torch.from_numpy(np.sqrt((values**2).sum(0)))
        baseline = torch.from_numpy(values.astype(np.float32)).square().sum(0).sqrt()
        close = compare(seen[name].norm(), baseline, exact, factor=4.0)
        assert close.ok, close
        assert seen[name].tokens == 15


def test_padding_is_not_counted(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Cast", ["attention_mask"], ["z"], to=1)]
    proto = build(nodes, {"x": ["b", "s", 4], "attention_mask": ["b", "s"]}, ["y", "z"], {"w": dense(4, 4)})
    proto.graph.input[1].type.tensor_type.elem_type = 7
    x = np.ones((2, 3, 4), np.float32)
    x[0, 2] = np.inf
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    seen = observe(saved(proto, tmp_path), {"x": 4}, [{"x": x, "attention_mask": mask}])
    assert seen["x"].tokens == 3
    with pytest.raises(InputError, match="x: activations hold NaN"):
        observe(saved(proto, tmp_path), {"x": 4}, [{"x": x, "attention_mask": mask * 0 + 1}])
