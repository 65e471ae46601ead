"""The comparison with onnxruntime-genai: a head of 4 bits is the same head, and contestants take turns."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_models import build, dense, genai, node, rng, saved

sys.path.append(str(Path(__file__).parent.parent.parent / "tools"))  # behind the installed package, as the tool does it

import bench_genai
from bench_genai import head_name, int4_blocks, measure, with_int4_head


def run(path, feed):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feed)[0]


def dequantised(codes, scales):
    """By plain loops: two codes a byte, the lower half first, 8 is zero."""
    weight = np.zeros((len(codes), scales.shape[1] * 32), np.float32)
    for n, row in enumerate(codes):
        for block, packed in enumerate(row):
            for i, byte in enumerate(packed):
                for half, code in enumerate((byte & 15, byte >> 4)):
                    weight[n, block * 32 + 2 * i + half] = (int(code) - 8) * scales[n, block]
    return weight


def test_codes_of_4_bits_are_the_nearest():
    weight = rng().standard_normal((3, 64)).astype(np.float32)
    weight[1, :32] = 0
    codes, scales = int4_blocks(weight)
    assert codes.shape == (3, 2, 16)
    assert codes.dtype == np.uint8
    error = np.abs(dequantised(codes, scales) - weight).reshape(3, 2, 32).max(axis=2)
    assert (error <= scales / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_head_is_exchanged_and_nothing_else(tmp_path, transposed):
    kept = dense(48, 64) if transposed else dense(64, 48)
    nodes = [node("Relu", ["x"], ["h"]), node("MatMul", ["h", "w_t" if transposed else "w"], ["logits"], name="head")]
    if transposed:
        nodes.insert(0, node("Transpose", ["w"], ["w_t"], perm=[1, 0]))
    path = saved(build(nodes, {"x": ["t", 64]}, ["logits"], {"w": kept}), tmp_path)
    (tmp_path / "own").mkdir()
    out = with_int4_head(path, tmp_path / "own")
    assert (head_name(path), head_name(out)) == ("fp32", "int4, blocks of 32")
    x = rng(1).standard_normal((5, 64)).astype(np.float32)
    weight = dequantised(*int4_blocks(kept if transposed else np.ascontiguousarray(kept.T)))
    exact = np.maximum(x, 0) @ weight.T
    np.testing.assert_allclose(run(out, {"x": x}), exact, atol=0.02 * np.abs(exact).max())  # it rounds x to 8 bits


def test_a_model_of_genais_builder_has_a_head(tmp_path):
    assert head_name(genai(tmp_path)) == "fp32"


def test_they_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(bench_genai, "REST", 0.0)
    order = []

    def contestant(name):
        return lambda cached, steps: order.append(name) or float(len(order))

    times = measure({name: contestant(name) for name in "ab"}, 64, 16, 2)
    assert order == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
