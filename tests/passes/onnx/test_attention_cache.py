"""Joining the cache inside Attention, on graphs from text."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.onnx.attention_cache import JoinCacheInAttention

# 2 key heads for 6 query heads; P tokens in the cache, S new ones.
BEFORE = """
<ir_version: 10, opset_import: ["" : 23]>
cached (float[B, 6, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, float[B, 2, P, 8] pk, float[B, 2, P, 8] pv,
    bool[B, 1, S, T] mask) => (float[B, 6, S, 8] y, float[B, 2, T, 8] keys, float[B, 2, T, 8] values)
{
    keys = Concat <axis = -2> (pk, k)
    values = Concat <axis = 2> (pv, v)
    y = Attention <scale = 0.5> (q, keys, values, mask)
}
"""


def model(text: str = BEFORE) -> ir.Model:
    return ir.from_onnx_text(text)


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[torch.Tensor]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(["y", "keys", "values"], feed)]


def test_attention_takes_the_past_and_returns_the_present():
    joined = model()
    assert JoinCacheInAttention()(joined).modified
    (attention,) = joined.graph
    assert [value.name for value in attention.inputs] == ["q", "k", "v", "mask", "pk", "pv"]
    assert [value.name for value in attention.outputs] == ["y", "keys", "values"]
    assert attention.attributes["scale"].as_float() == 0.5
    assert [value.name for value in joined.graph.outputs] == ["y", "keys", "values"]
    assert not JoinCacheInAttention()(joined).modified


@pytest.mark.parametrize(("batch", "new", "past"), [(1, 1, 0), (1, 1, 7), (2, 3, 4), (2, 5, 0)])
def test_the_results_are_the_same_in_onnx_runtime(batch, new, past):
    random = np.random.default_rng(1)
    sizes = {"q": (6, new), "k": (2, new), "v": (2, new), "pk": (2, past), "pv": (2, past)}
    feed = {name: random.standard_normal((batch, h, t, 8), dtype=np.float32) for name, (h, t) in sizes.items()}
    feed["mask"] = random.random((batch, 1, new, past + new)) < 0.7
    feed["mask"][..., 0] = True
    joined = model()
    JoinCacheInAttention()(joined)
    baseline, got = run(model(), feed), run(joined, feed)
    assert torch.equal(got[1], baseline[1])
    assert torch.equal(got[2], baseline[2])
    q, keys, values = (x.double() for x in (torch.from_numpy(feed["q"]), *baseline[1:]))
    mask = torch.from_numpy(feed["mask"])
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=0.5, enable_gqa=True
    )
    close = compare(got[0], baseline[0], exact)
    assert close.ok, close


ATTENTION = "y = Attention <scale = 0.5> (q, keys, values, mask)"
LEFT_ALONE = {
    "causal": BEFORE.replace("scale = 0.5", "is_causal = 1"),
    "joined along another axis": BEFORE.replace("axis = 2", "axis = 1"),
    "three parts": BEFORE.replace("(pk, k)", "(pk, k, k)"),
    "values not joined": BEFORE.replace("keys, values, mask)", "keys, v, mask)"),
    "keys serve as values": BEFORE.replace("keys, values, mask)", "keys, keys, mask)"),
    "keys read elsewhere": BEFORE.replace(ATTENTION, f"other = Relu (keys)\n    {ATTENTION}"),
    "with a past": BEFORE.replace("(q, keys, values, mask)", "(q, keys, values, mask, pk, pv)"),
    "with further outputs": BEFORE.replace("    y = Attention", "    y, more = Attention"),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_left_alone(why):
    untouched = model(LEFT_ALONE[why])
    before = ir.to_proto(untouched).SerializeToString()
    assert not JoinCacheInAttention()(untouched).modified
    assert ir.to_proto(untouched).SerializeToString() == before
