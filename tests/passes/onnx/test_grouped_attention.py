"""Sharing key and value heads, on graphs from text."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.onnx.grouped_attention import ShareAttentionHeads

# 2 key heads for 6 query heads; T and L are dynamic.
BEFORE = """
<ir_version: 10, opset_import: ["" : 23]>
grouped (float[B, 6, T, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v) => (float[B, 6, T, 8] y)
<int64[1] axis = {2}, int64[5] by = {1, 1, 3, 1, 1}, int64[4] joined = {0, 6, -1, 8}>
{
    k5 = Unsqueeze (k, axis)
    kx = Expand (k5, by)
    kr = Reshape (kx, joined)
    v5 = Unsqueeze (v, axis)
    vx = Expand (v5, by)
    vr = Reshape (vx, joined)
    y = Attention (q, kr, vr)
}
"""


def model(text: str = BEFORE, **shapes) -> ir.Model:
    """The graph with the shapes that torch's exporter records."""
    parsed = ir.from_onnx_text(text)
    known = {"kx": ["B", 2, 3, "L", 8], "vx": ["B", 2, 3, "L", 8], "kr": ["B", 6, "L", 8], "vr": ["B", 6, "L", 8]}
    for node in parsed.graph:
        for value in node.outputs:
            if shape := {**known, **shapes}.get(value.name):
                value.shape = ir.Shape(shape)
    return parsed


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> torch.Tensor:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed)[0])


def test_the_repetition_is_taken_out():
    shared = model()
    assert ShareAttentionHeads()(shared).modified
    (attention,) = [node for node in shared.graph if node.op_type == "Attention"]
    assert [value.name for value in attention.inputs] == ["q", "k", "v"]
    assert not ShareAttentionHeads()(shared).modified


@pytest.mark.parametrize(("batch", "queries", "length"), [(1, 1, 1), (2, 3, 5)])
def test_the_result_is_the_same_in_onnx_runtime(batch, queries, length):
    random = np.random.default_rng(1)
    sizes = {"q": (6, queries), "k": (2, length), "v": (2, length)}
    feed = {name: random.standard_normal((batch, h, t, 8), dtype=np.float32) for name, (h, t) in sizes.items()}
    shared = model()
    ShareAttentionHeads()(shared)
    q, k, v = (torch.from_numpy(feed[name]).double() for name in "qkv")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close = compare(run(shared, feed), run(model(), feed), exact)
    assert close.ok, close


LEFT_ALONE = {
    "heads repeated as a whole": model(BEFORE.replace("axis = {2}", "axis = {1}").replace("{1, 1, 3,", "{1, 3, 1,")),
    "unknown shape": model(kx=None),
    "length repeated": model(
        BEFORE.replace("{0, 6, -1, 8}", "{0, 2, -1, 8}"), kr=["B", 2, "L", 8], vr=["B", 2, "L", 8]
    ),
    "only the keys": model(BEFORE.replace("Attention (q, kr, vr)", "Attention (q, kr, v)")),
    "another order": model(BEFORE.replace("kr = Reshape (kx, joined)", "kr = Identity (kx)")),
    "a graph input": model(BEFORE.replace("Attention (q, kr, vr)", "Attention (q, k, v)")),
    "with a past": model(
        BEFORE.replace("Attention (q, kr, vr)", "Attention (q, kr, vr, , pk, pv)").replace(
            "float[B, 2, L, 8] v)", "float[B, 2, L, 8] v, float[B, 6, P, 8] pk, float[B, 6, P, 8] pv)"
        )
    ),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_left_alone(why):
    before = ir.to_proto(LEFT_ALONE[why]).SerializeToString()
    assert not ShareAttentionHeads()(LEFT_ALONE[why]).modified
    assert ir.to_proto(LEFT_ALONE[why]).SerializeToString() == before
