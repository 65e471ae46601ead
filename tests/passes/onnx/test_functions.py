"""The bodies of the sparse ops run in ONNX Runtime without our library, in every opset from 11 on."""

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.functions import functions_for


def weight(pattern):
    full = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    keep = nm_keep_mask(full.abs(), pattern) if isinstance(pattern, NM) else full.abs() > 0.5
    return full * keep


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 17, 18, 21, 23, 24])
@pytest.mark.parametrize("storage", [Storage("fp32"), Storage("int8"), Storage("int4", 32)], ids=lambda s: s.kind)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 32), NM(3, 8), Unstructured(0.5)], ids=str)
def test_every_opset(opset, pattern, storage):
    packed = pack(weight(pattern), pattern, storage)
    # A second linear of another width: opset 11 cannot hand its in_features to a function.
    narrow = pack(weight(pattern)[:, :32].contiguous(), pattern, storage)
    ops, weights = [], []
    for name, parts in (("w", packed), ("v", narrow)):
        x = "x" if name == "w" else "first"
        names = [f"{name}.{n}" for n in parts.tensors]
        weights += [numpy_helper.from_array(t.numpy(), n) for n, t in zip(names, parts.tensors.values(), strict=True)]
        node = helper.make_node(parts.op, [x, *names], [f"y.{name}"], domain="sparsify", **parts.attributes)
        ops.append(node)
    x, first = (helper.make_tensor_value_info(n, 1, ["t", s]) for n, s in (("x", 64), ("first", 32)))
    outputs = [helper.make_tensor_value_info(f"y.{n}", 1, ["t", 8]) for n in "wv"]
    graph = helper.make_graph(ops, "g", [x, first], outputs, weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, functions=functions_for(ops, opset), opset_imports=imports, ir_version=8)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    got = session.run(None, {"x": x.numpy(), "first": x[:, :32].numpy()})
    for y, parts, given in zip(got, (packed, narrow), (x, x[:, :32]), strict=True):
        dense = parts.unpack()
        exact = storage.activations(given.double()) @ dense.double().T
        close = compare(torch.from_numpy(y), storage.activations(given) @ dense.T, exact)
        assert close.ok, close


def test_opset_11_holds_one_pattern_only():
    nodes = [helper.make_node("linear_nm", ["x"], ["y"], domain="sparsify", n=n, m=4) for n in (1, 2)]
    assert functions_for(nodes, 12)
    with pytest.raises(InputError, match="opset 11 cannot hold sparse ops with more than one n; want 12"):
        functions_for(nodes, 11)
