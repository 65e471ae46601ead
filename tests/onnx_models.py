"""ONNX models built by hand, the way other tools write them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
MICROSOFT = "com.microsoft"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dense(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """``[rows, columns]``, scaled so that products stay near 1."""
    return (rng(seed).standard_normal((rows, columns)) / rows**0.5).astype(np.float32)


def sparse_kn(k: int, n: int, keep: int = 2, of: int = 4, seed: int = 0) -> np.ndarray:
    """``[K, N]`` that keeps the first ``keep`` of every ``of`` neighbours along K."""
    weight = dense(k, n, seed)
    weight[np.arange(k) % of >= keep] = 0
    return weight


def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: list[str],
    weights: dict[str, np.ndarray],
    *,
    opset: int = 18,
    ir: int = 8,
    kind: int = FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, [None, None]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    if any(n.domain == MICROSOFT for n in nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def saved(model: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(model, str(path))
    return path


def mlp(*weights: np.ndarray, opset: int = 18, ir: int = 8) -> onnx.ModelProto:
    """``x W0 + b0 -> Relu -> x W1 + b1 -> Relu ...``; weights ``[K, N]``, names ``w0, b0, fc0`` and so on."""
    nodes, stored, x = [], {}, "x"
    for i, weight in enumerate(weights):
        stored |= {f"w{i}": weight, f"b{i}": rng(i + 100).standard_normal(weight.shape[1]).astype(np.float32)}
        nodes += [
            node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"fc{i}"),
            node("Add", [f"b{i}", f"m{i}"], [f"a{i}"]),
            node("Relu", [f"a{i}"], [f"r{i}"]),
        ]
        x = f"r{i}"
    return build(nodes, {"x": ["batch", weights[0].shape[0]]}, [x], stored, opset=opset, ir=ir)


def genai(folder):
    """Two layers as onnxruntime-genai's builder writes them."""
    width, heads, vocabulary = 64, 4, 48
    nodes = [
        node("Gather", ["embed", "input_ids"], ["h"]),
        node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        node("Sub", ["sum", "unit"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "axis"], ["total64"], axis=0),
        node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        node("SimplifiedLayerNormalization", ["h", "norm"], ["n0"], axis=-1, epsilon=1e-5, stash_type=1),
        node("MatMul", ["n0", "w_qkv"], ["qkv"], name="/attn/qkv_proj/MatMul"),
        node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "seqlens", "total"],
            ["a", "present.0.key", "present.0.value"],
            num_heads=heads,
            kv_num_heads=2,
            domain=MICROSOFT,
        ),
        node("MatMul", ["a", "w_o"], ["o"], name="/attn/o_proj/MatMul"),
        node(
            "SkipSimplifiedLayerNormalization", ["h", "o", "norm"], ["n1", "", "", "s"], epsilon=1e-5, domain=MICROSOFT
        ),
        node("MatMul", ["n1", "w_up"], ["u"], name="/mlp/up_proj/MatMul"),
        node("Sigmoid", ["u"], ["g"]),
        node("Mul", ["u", "g"], ["m"]),
        node("MatMul", ["m", "w_down"], ["d"], name="/mlp/down_proj/MatMul"),
        node("SkipSimplifiedLayerNormalization", ["s", "d", "norm"], ["n2"], epsilon=1e-5, domain=MICROSOFT),
        node("MatMul", ["n2", "w_head"], ["logits"], name="/lm_head/MatMul"),
    ]
    weights = {
        "embed": dense(vocabulary, width) * 7,
        "norm": np.ones(width, np.float32),
        "w_qkv": dense(width, 2 * width, 1),
        "w_o": dense(width, width, 2),
        "w_up": dense(width, 128, 3),
        "w_down": dense(128, width, 4),
        "w_head": dense(width, vocabulary, 5),
        "one": np.array([1]),
        "unit": np.array([1]),
        "axis": np.array(1),
    }
    cache = ["batch_size", 2, "past_sequence_length", "kv_cache_dim"]
    inputs = {"input_ids": ["batch_size", "sequence_length"], "attention_mask": ["batch_size", "total_sequence_length"]}
    pasts = {f"past_key_values.0.{name}": cache for name in ("key", "value")}
    outputs = ["logits", "present.0.key", "present.0.value"]
    proto = build(nodes, inputs | pasts, outputs, weights, opset=21, ir=10)
    for value in proto.graph.input[:2]:
        value.type.tensor_type.elem_type = TensorProto.INT64
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(n, FLOAT, [None] * (3 if n == "logits" else 4)) for n in outputs
    )
    return saved(proto, folder, "genai.onnx")


def eights(k=64, n=32):
    """Small integers, int8 ``[K, N]``, one of four neighbours along K kept."""
    values = rng().integers(1, 100, (k, n)).astype(np.int8)
    values[np.arange(k) % 4 != 0] = 0
    return values


def quantised(form):
    """One linear of 64 to 32 whose quantised weight is 1:4."""
    scale = np.full(32, 2.0**-9, np.float32)
    bias = dense(1, 32)[0]
    if form == "MatMulNBits":
        packed = (eights().T.astype(np.int16) + 128).astype(np.uint8).reshape(32, 2, 32)
        attributes = {"K": 64, "N": 32, "bits": 8, "block_size": 32, "domain": MICROSOFT}
        weights = {"w": packed, "s": np.full((32, 2), 2.0**-9, np.float32), "b": bias}
        nodes = [node("MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], name="fc", **attributes)]
        return nodes, weights
    if form == "DequantizeLinear":
        nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("Gemm", ["x", "v", "b"], ["y"], name="fc")]
        return nodes, {"w": eights(), "s": scale, "b": bias}
    if form == "Cast and Mul":
        nodes = [node("Cast", ["w"], ["f"], to=1), node("Mul", ["f", "s"], ["v"])]
        nodes += [node("MatMul", ["x", "v"], ["m"], name="fc"), node("Add", ["m", "b"], ["y"])]
        return nodes, {"w": eights(), "s": scale, "b": bias}
    if form == "DynamicQuantizeMatMul":
        nodes = [node("DynamicQuantizeMatMul", ["x", "w", "s", "", "b"], ["y"], name="fc", domain=MICROSOFT)]
        return nodes, {"w": eights(), "s": scale, "b": bias}
    quantise = node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"])
    if form == "MatMulIntegerToFloat":
        names = ["q", "w", "xs", "s", "xz", "", "b"]
        nodes = [quantise, node("MatMulIntegerToFloat", names, ["y"], name="fc", domain=MICROSOFT)]
    else:
        nodes = [
            quantise,
            node("MatMulInteger", ["q", "w", "xz"], ["i"], name="fc"),
            node("Cast", ["i"], ["f"], to=1),
            node("Mul", ["xs", "s"], ["both"]),
            node("Mul", ["f", "both"], ["m"]),
            node("Add", ["m", "b"], ["y"]),
        ]
    return nodes, {"w": eights(), "s": scale, "b": bias}


FORMS = ["MatMulNBits", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"]
"""The ops and groups of ops that ``quantised`` makes."""
