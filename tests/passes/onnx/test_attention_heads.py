"""Splitting heads inside Attention, on graphs from text."""

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.onnx.attention_heads import SplitHeadsInAttention

# 2 key heads for 4 query heads of 8; only queries and keys are turned.
BEFORE = """
<ir_version: 10, opset_import: ["" : 23]>
heads (float[B, S, 32] x, float[B, S, 16] xk, float[B, S, 16] xv, float[B, S, 4] cos, float[B, S, 4] sin)
    => (float[B, S, 32] y)
<int64[4] four = {0, 0, -1, 8}, int64[3] three = {0, 0, -1}, float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}>
{
    q4 = Reshape (x, four)
    k4 = Reshape (xk, four)
    v4 = Reshape (xv, four)
    qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 1, 3]> (k4)
    vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    q = RotaryEmbedding (qt, cos, sin)
    k = RotaryEmbedding (kt, cos, sin)
    a = Attention (q, k, vt)
    at = Transpose <perm = [0, 2, 1, 3]> (a)
    y3 = Reshape (at, three)
    y = Identity (y3)
}
"""
SHAPES = {
    **{name: ["B", "S", 4, 8] for name in ("q4", "at", "qn4")},
    **{name: ["B", "S", 2, 8] for name in ("k4", "v4")},
    **{name: ["B", 4, "S", 8] for name in ("qt", "q", "a", "qn")},
    **{name: ["B", 2, "S", 8] for name in ("kt", "k", "vt")},
    "y3": ["B", "S", 32],
}
# Qwen3 normalises every head before the Transpose, Gemma3 behind it.
NORM = "RMSNormalization <axis = -1, epsilon = 0.01>"
NORM_BEFORE = BEFORE.replace("qt = Transpose <perm = [0, 2, 1, 3]> (q4)", "qt = Transpose <perm = [0, 2, 1, 3]> (qn4)")
NORM_BEFORE = NORM_BEFORE.replace("k4 = Reshape", f"qn4 = {NORM} (q4, scale)\n    k4 = Reshape")
NORM_BEHIND = BEFORE.replace("q = Rotary", f"qn = {NORM} (qt, scale)\n    q = Rotary").replace("(qt, cos", "(qn, cos")


def model(text: str = BEFORE, **shapes) -> ir.Model:
    """The graph with the shapes that torch's exporter records."""
    parsed = ir.from_onnx_text(text)
    for node in parsed.graph:
        for value in node.outputs:
            if shape := {**SHAPES, **shapes}.get(value.name):
                value.shape = ir.Shape(shape)
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return parsed


def rewritten(text: str) -> ir.Model:
    changed = model(text)
    assert SplitHeadsInAttention()(changed).modified
    common.RemoveUnusedNodesPass()(changed)
    return changed


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> torch.Tensor:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (BEFORE, "RotaryEmbedding RotaryEmbedding Attention Identity"),
        (
            NORM_BEFORE,
            "Reshape RMSNormalization Constant Reshape RotaryEmbedding RotaryEmbedding Attention Identity",
        ),
        (
            NORM_BEHIND,
            "Reshape RMSNormalization Constant Reshape RotaryEmbedding RotaryEmbedding Attention Identity",
        ),
    ],
)
def test_no_transpose_is_left(text, ops):
    changed = rewritten(text)
    assert [node.op_type for node in changed.graph] == ops.split()
    (attention,) = [node for node in changed.graph if node.op_type == "Attention"]
    assert {name: attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")} == {
        "q_num_heads": 4,
        "kv_num_heads": 2,
    }
    assert attention.inputs[2].name == "xv"
    assert not SplitHeadsInAttention()(changed).modified


@pytest.mark.parametrize("text", [BEFORE, NORM_BEFORE, NORM_BEHIND])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5)])
def test_the_result_is_the_same_in_onnx_runtime(text, batch, tokens):
    random = np.random.default_rng(1)
    widths = {"x": 32, "xk": 16, "xv": 16}
    feed = {name: random.standard_normal((batch, tokens, w), dtype=np.float32) for name, w in widths.items()}
    angle = random.standard_normal((batch, tokens, 4))
    feed |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    baseline = run(model(text), feed)
    close = compare(run(rewritten(text), feed), baseline, exact(feed, normalised=text is not BEFORE))
    assert close.ok, close


def exact(feed: dict[str, np.ndarray], *, normalised: bool) -> torch.Tensor:
    """The same in float64, as the ONNX specification says it."""
    q, k, v = (torch.from_numpy(feed[n]).double().unflatten(-1, (-1, 8)).transpose(1, 2) for n in ("x", "xk", "xv"))
    cos, sin = (torch.from_numpy(feed[n]).double()[:, None] for n in ("cos", "sin"))
    if normalised:
        q = q / (q.square().mean(-1, keepdim=True) + 0.01).sqrt() * torch.arange(1, 9)

    def turned(x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    y = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


LEFT_ALONE = {
    "another permutation": model(BEFORE.replace("[0, 2, 1, 3]> (v4)", "[0, 1, 2, 3]> (v4)")),
    "another op in between": model(BEFORE.replace("k = RotaryEmbedding (kt, cos, sin)", "k = Relu (kt)")),
    "size of a head not known": model(v4=["B", "S", 2, "D"]),
    "output not joined": model(BEFORE.replace("y3 = Reshape (at, three)", "y3 = Relu (at)")),
    "output of another shape": model(y3=["S", "B", 32]),
    "shape of the output not known": model(y3=None),
    "output read on the way": model(BEFORE.replace("y3 =", "z = Relu (a)\n    y3 =")),
    "norm over more than a head": model(NORM_BEHIND.replace("axis = -1", "axis = 1")),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_left_alone(why):
    before = ir.to_proto(LEFT_ALONE[why]).SerializeToString()
    assert not SplitHeadsInAttention()(LEFT_ALONE[why]).modified
    assert ir.to_proto(LEFT_ALONE[why]).SerializeToString() == before
