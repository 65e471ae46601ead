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
