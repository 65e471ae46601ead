"""Dense codes: the layout against plain loops, and ONNX Runtime's own operator against the unpacked weight."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sparsify_export.passes.dialect import linear_codes
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage, quantise_blocks, quantise_tokens
from sparsify_export.passes.equivalence import compare

STORAGES = [Storage("int8", blocked=True), *(Storage("int4", g, blocked=True) for g in (32, 64, 128))]


def weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 192])
def test_codes_and_scales_follow_the_layout(storage, columns):
    exact, block = weight(3, columns), storage.block_of(columns)
    codes, scales = linear_codes.pack(exact, storage)
    bits, limit = (8, 127) if storage.kind == "int8" else (4, 7)
    for row in range(3):
        for column in range(columns):
            at, place = divmod(column, block)
            group = exact[row] if bits == 8 else exact[row, at * block : (at + 1) * block]
            scale = group.abs().max() / limit
            scale = scale if bits == 8 else scale.half().float()
            assert scales[row, at] == scale
            byte = int(codes[row, at, place if bits == 8 else place // 2])
            code = byte if bits == 8 else (byte >> 4 if place % 2 else byte & 15)
            assert code - 2 ** (bits - 1) == round(float(exact[row, column] / scale))
    stored = pack(exact, None, storage)
    assert stored.nbytes == linear_codes.packed_bytes(3, columns, storage)
    again = pack(stored.unpack(), None, storage)
    assert all(torch.equal(again.tensors[name], stored.tensors[name]) for name in linear_codes.TENSORS)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 24)])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 128), (1, 100), (7, 192), (40, 64)])
def test_onnx_runtime_computes_the_reference(storage, tokens, columns, bias):
    """Beside it a fault of one code is seen: the tolerance is a few times the error of the plain expression."""
    stored = pack(weight(24, columns), None, storage)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2))
    got = run(stored, storage, x, bias)
    bits, block = stored.attributes["bits"], stored.attributes["block"]

    def wanted(x, codes, bias):
        return linear_codes.reference(x, codes, stored.tensors["scales"], bias, bits, block, columns)

    def exact(codes):  # rounded activations are what the operator defines, so they are part of the truth
        rounded = quantise_blocks(x, block).double()
        dense = linear_codes.unpack(codes, stored.tensors["scales"], bits, columns).double()
        return torch.nn.functional.linear(rounded, dense, None if bias is None else bias.double())

    codes = stored.tensors["codes"]
    close = compare(got, wanted(x, codes, bias), exact(codes), factor=8.0)
    assert close.error < 20 * max(close.budget, 1e-6), close
    wrong = codes.clone()
    wrong[0, 0, 0] ^= 0x40
    assert not compare(got, wanted(x, wrong, bias), exact(wrong), factor=8.0).ok


def run(stored, storage, x, bias):
    """The node that `to_onnx` writes, in a model of its own."""
    given = {name: stored.tensors[name].numpy() for name in linear_codes.TENSORS}
    if bias is not None:
        given["bias"] = bias.numpy()
    rows = len(given["codes"])
    node = helper.make_node(
        linear_codes.NODE,
        ["x", "codes", "scales", "", "", "bias" if bias is not None else ""],
        ["y"],
        domain=linear_codes.DOMAIN,
        **linear_codes.attributes(storage, rows, x.shape[1]),
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), rows])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in given.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(linear_codes.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return torch.from_numpy(ort.InferenceSession(model).run(None, {"x": x.numpy()})[0])


def test_activations_are_rounded_a_block_at_a_time():
    x = torch.randn(2, 3, 80)
    parts = [quantise_tokens(x[..., begin : begin + 32]) for begin in (0, 32, 64)]
    assert torch.equal(quantise_blocks(x, 32), torch.cat(parts, dim=-1))
    assert torch.equal(Storage("int4", 32, blocked=True).activations(x), torch.cat(parts, dim=-1))
