"""An ONNX model in: position embeddings that are resized, as vision transformers do for images of another size."""

import numpy as np
import pytest
from onnx_command import compiled
from onnx_models import build, dense, node, rng, saved


@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resized_position_embeddings(tmp_path, by):
    """A grid of 4 x 4 positions of 64 numbers becomes 8 x 8, and what reads it is lowered and verified."""
    weights = {
        "positions": rng(1).standard_normal((1, 64, 4, 4)).astype(np.float32),
        "scales": np.array([1, 1, 2.0, 2.0], np.float32),
        "sizes": np.array([1, 64, 8, 8]),
        "flat": np.array([64, 64]),
        "w": dense(64, 64),
        "v": dense(64, 32, 1),
    }
    del weights["sizes" if by == "scales" else "scales"]
    inputs = ["positions", "", "scales"] if by == "scales" else ["positions", "", "", "sizes"]
    nodes = [
        node("Resize", inputs, ["grid"], mode="cubic", coordinate_transformation_mode="half_pixel"),
        node("Reshape", ["grid", "flat"], ["rows"]),
        node("Transpose", ["rows"], ["p"], perm=[1, 0]),
        node("Add", ["x", "p"], ["h"]),
        node("MatMul", ["h", "w"], ["m"], name="fc"),
        node("Gelu", ["m"], ["g"]),
        node("MatMul", ["g", "v"], ["y"], name="head"),
    ]
    path = saved(build(nodes, {"x": [64, 64]}, ["y"], weights, opset=20, ir=9), tmp_path)
    report = compiled(path, tmp_path / "o.onnx", "--nm", "2:4")
    assert {entry["path"]: entry["op"] for entry in report["linears"]} == {"fc": "linear_nm", "head": "MatMul"}
    assert all(entry["error"] <= entry["allowed"] for entry in report["verified"])
