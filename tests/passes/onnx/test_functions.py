"""The bodies of the sparse ops run in ONNX Runtime without our library, in every opset from 11 on."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.functions import functions_for
from sparsify_export.passes.onnx.sparse_linears import pack


def weight(pattern):
    full = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    keep = nm_keep_mask(full.abs(), pattern) if isinstance(pattern, NM) else full.abs() > 0.5
    return full * keep


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 17, 18, 21, 23, 24])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 32), NM(3, 8), Unstructured(0.5)], ids=str)
def test_every_opset(opset, pattern):
    sparse = weight(pattern)
    packed = pack(sparse, pattern, torch.float32)
    op = helper.make_node(packed.op, ["x", *packed.tensors], ["y"], domain="sparsify", **packed.attributes)
    weights = [numpy_helper.from_array(t.numpy(), n) for n, t in packed.tensors.items()]
    x, y = (helper.make_tensor_value_info(n, 1, ["t", s]) for n, s in (("x", 64), ("y", 8)))
    graph = helper.make_graph([op], "g", [x], [y], weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, functions=functions_for([op], opset), opset_imports=imports, ir_version=8)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    got = torch.from_numpy(session.run(None, {"x": x.numpy().astype(np.float32)})[0])
    close = compare(got, x @ sparse.T, x.double() @ sparse.double().T)
    assert close.ok, close


def test_opset_11_holds_one_pattern_only():
    nodes = [helper.make_node("linear_nm", ["x"], ["y"], domain="sparsify", n=n, m=4) for n in (1, 2)]
    assert functions_for(nodes, 12)
    with pytest.raises(InputError, match="opset 11 cannot hold linear_nm with more than one n"):
        functions_for(nodes, 11)
