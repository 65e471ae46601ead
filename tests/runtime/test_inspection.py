"""What inspection finds in our files and in files of others."""

import json

import numpy as np
import onnx
import pytest
import torch
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm
from sparsify_export.passes.errors import InputError, VerificationError
from sparsify_export.runtime.inspection import check_pattern, inspect, parts_of, render, sparse_weights

RNG = np.random.default_rng(0)
DENSE = RNG.standard_normal((16, 12), np.float32)
NM_ROWS = np.where(np.arange(12) % 4 < 2, DENSE, 0)  # [N, K] = [16, 12], 2:4 along its last axis


def cells(table):
    return [list(column._cells) for column in table.columns]


def test_our_file(tiny):
    q, o, up, head = inspect(tiny.path)
    assert (q.path, q.op, q.shape, q.pattern, q.reason) == ("layers.0.q", "linear_nm", (8, 8), "2:4", "")
    assert (q.dense_bytes, q.stored_bytes) == (256, 8 * 4 * 4 + 8)
    kept = int(tiny.model.o.count_nonzero())
    assert (o.op, o.shape, o.pattern) == ("linear_bitmask", (8, 8), f"{1 - kept / 64:.1%} zeros")
    assert o.stored_bytes == 4 * kept + 8 + 8 * 9
    assert (up.op, up.pattern, up.reason, up.stored_bytes) == ("MatMul", None, "the weight is dense", 256)
    assert (head.path, head.shape, head.weight) == ("lm_head", (23, 8), "embed")
    table = render([q, o, up, head])
    assert cells(table)[0] == ["layers.0.q", "layers.0.o", "layers.0.up", "lm_head", "2 of 4 lowered"]


def test_unpacked_weights_are_those_that_were_packed(tiny):
    (_, q), (_, o) = sparse_weights(tiny.path)
    assert torch.equal(q, tiny.model.q)
    assert torch.equal(o, tiny.model.o)


@pytest.mark.parametrize(
    ("op", "weight"),
    [
        ("MatMul (x, w)", NM_ROWS.T),
        ("Gemm <transB = 1> (x, w)", NM_ROWS),
        ("Gemm (x, w)", NM_ROWS.T),
    ],
)
def test_a_pattern_is_looked_for_along_in_features(onnx_file, op, weight):
    path = onnx_file(f"g (float[t, 12] x) => (float[t, 16] y) {{ y = {op} }}", w=weight)
    (info,) = inspect(path)
    assert (info.shape, info.pattern, info.dense_bytes, info.stored_bytes) == ((16, 12), "2:4", 768, 768)
    assert info.reason == f"the file uses a plain {info.op}"
    assert torch.equal(next(sparse_weights(path))[1], torch.from_numpy(NM_ROWS))
    assert check_pattern(path, NM(2, 4)).groups == 16 * 3


def test_along_the_other_axis_it_is_only_zeros(onnx_file):
    path = onnx_file("g (float[t, 16] x) => (float[t, 12] y) { y = MatMul (x, w) }", w=NM_ROWS)
    assert inspect(path)[0].pattern == "50.0% zeros"


def test_tied_rank_3_and_computed_weights(onnx_file):
    path = onnx_file(
        """g (int64[t] ids, float[t, 12] x) => (float[t, 16] y, float[3, t, 16] z, float[t, t] s, float[t, 12] e)
        {
            e = Gather (w, ids)
            w2 = Transpose <perm = [1, 0]> (w)
            y = MatMul (x, w2)
            z = MatMul (x, experts)
            xt = Transpose <perm = [1, 0]> (x)
            s = MatMul (x, xt)
        }""",
        w=NM_ROWS,
        experts=np.ones((3, 12, 16), np.float32),
    )
    tied, experts = inspect(path)
    assert (tied.shape, tied.pattern, tied.reason) == ((16, 12), "2:4", "Gather e reads the same weight")
    assert (experts.shape, experts.pattern, experts.reason) == ((3, 16, 12), None, "its weight has rank 3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values(tmp_path, dtype):
    values, indices = linear_nm.pack(torch.from_numpy(NM_ROWS), NM(2, 4), dtype)
    path = tmp_path / "model.onnx"
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 23, "sparsify" : 1]> g (float[t, 12] x) => (float[t, 16] y)
        { y = sparsify.linear_nm <n = 2, m = 4> (x, v, i) }"""
    )
    kind = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    raw = values.view(torch.int16).numpy().tobytes()
    proto.graph.initializer.append(onnx.helper.make_tensor("v", kind, values.shape, raw, raw=True))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(indices.numpy(), "i"))
    onnx.save(proto, path)
    ((info, weight),) = sparse_weights(path)
    assert torch.equal(weight, torch.from_numpy(NM_ROWS).to(dtype).float())
    assert info.stored_bytes == 16 * (6 * 2 + 2)


def test_check_pattern_counts(tmp_path, onnx_file, tiny):
    some = NM_ROWS.copy()
    some[0, 0] = 0  # a kept weight that is zero
    path = onnx_file("g (float[t, 12] x) => (float[t, 16] y) { y = Gemm <transB = 1> (x, w) }", w=some)
    count = check_pattern(path, NM(2, 4))
    assert (count.weights, count.groups, count.full) == (1, 48, 47)
    with pytest.raises(VerificationError, match="is not 1:4: a group of 4 holds 2"):
        check_pattern(path, NM(1, 4))
    with pytest.raises(VerificationError, match="12 in_features, no multiple of 8"):
        check_pattern(path, NM(4, 8))
    with pytest.raises(VerificationError, match=r"layers\.0\.o is not 2:4"):
        check_pattern(tiny.path, NM(2, 4))
    dense = onnx_file("g (float[t, 12] x) => (float[t, 16] y) { y = Gemm <transB = 1> (x, w) }", w=DENSE)
    with pytest.raises(VerificationError, match="has no sparse weight"):
        check_pattern(dense, NM(2, 4))


def test_two_values_in_one_place_are_damage(tiny, tmp_path):
    proto = onnx.load(tiny.path)
    (indices,) = [t for t in proto.graph.initializer if t.name == "q_indices"]
    indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros((8, 1), np.uint8), "q_indices"))
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"layers\.0\.q: indices must ascend inside a group"):
        check_pattern(tmp_path, NM(2, 4))


def test_refuses_damaged_files(tiny, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        inspect(tmp_path / "gone.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match="cannot read"):
        inspect(path)
    path.write_bytes(tiny.path.read_bytes())
    with pytest.raises(InputError, match="lacks its weights"):
        inspect(path)


def quantised_model(kind=onnx.TensorProto.INT8):
    """int8 or int4 codes behind DequantizeLinear, and what the compiler lists without reading."""
    codes = np.where(np.arange(32)[:, None] % 4 < 2, RNG.integers(1, 7, (32, 16)), 0)
    helper = onnx.helper
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"),
        helper.make_node("Einsum", ["x", "e"], ["z"], name="ein", equation="ij,jk->ik"),
        helper.make_node("Constant", [], ["s"], sparse_value=sparse_tensor("")),
        helper.make_node("MatMul", ["x", "s"], ["v"], name="sparse"),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", floats, [3, 32])],
        [helper.make_tensor_value_info(name, floats, [3, 16]) for name in "yzv"],
        [
            helper.make_tensor("codes", kind, codes.shape, codes.reshape(-1)),
            helper.make_tensor("scale", floats, [], [0.5]),
            onnx.numpy_helper.from_array(np.ones((32, 16), np.float32), "e"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), codes


def sparse_tensor(name):
    values = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [2.0])
    return onnx.helper.make_sparse_tensor(
        values, onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [5]), [32, 16]
    )


@pytest.mark.parametrize("kind", [onnx.TensorProto.INT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1])
def test_what_the_compiler_reads_and_what_it_leaves_is_listed(tmp_path, kind):
    """ "0 of 0" once: quantised forms, products of other kinds, weights that are stored as sparse tensors."""
    proto, codes = quantised_model(kind)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    fc, ein, sparse = inspect(path)
    assert (fc.path, fc.op, fc.shape, fc.pattern) == ("fc", "MatMul", (16, 32), "2:4")
    assert fc.bits == (8 if kind == onnx.TensorProto.INT8 else 4)
    assert fc.stored_bytes == 16 * 32 * fc.bits // 8 + 4
    if kind != onnx.TensorProto.FLOAT4E2M1:  # which rounds
        assert torch.equal(
            dict((i.path, w) for i, w in sparse_weights(path))["fc"], torch.from_numpy(codes.T * 0.5).float()
        )
    assert (ein.path, ein.reason) == ("ein", "the op Einsum is left as it is")
    assert (sparse.path, sparse.reason) == ("sparse", "its weight is stored as a sparse tensor")


def test_sparse_initializers_are_listed(tmp_path):
    proto, _ = quantised_model()
    del proto.graph.node[3]
    proto.graph.sparse_initializer.append(sparse_tensor("s"))
    onnx.save(proto, tmp_path / "m.onnx")
    assert [x.reason for x in inspect(tmp_path / "m.onnx")][-1] == "its weight is stored as a sparse tensor"


def test_a_product_of_several_linears_names_the_reason_of_each(onnx_file):
    path = onnx_file("g (float[t, 12] x) => (float[t, 16] y) { y = MatMul (x, w) }", w=DENSE.T)
    model = onnx.load(path)
    model.graph.node[0].name = "layers.0.q+k"
    reasons = {"layers.0.q": "skipped by --skip", "layers.0.k": "outside the repeated layers"}
    model.metadata_props.add(key="sparsify.left_dense", value=json.dumps(reasons))
    onnx.save(model, path)
    assert inspect(path)[0].reason == "layers.0.q: skipped by --skip; layers.0.k: outside the repeated layers"
    assert parts_of("a.self_attn.q+a.mlp.gate#2") == ["a.self_attn.q", "a.mlp.gate"]
    for damaged in ("[", "[1]", '{"layers.0.q": 3}'):
        model.metadata_props[-1].value = damaged
        onnx.save(model, path)
        assert inspect(path)[0].reason == "the weight is dense"


def test_a_weight_of_zeros_only_is_called_that(onnx_file):
    path = onnx_file("g (float[t, 12] x) => (float[t, 16] y) { y = MatMul (x, w) }", w=np.zeros((12, 16), np.float32))
    assert inspect(path)[0].reason == "the weight is zero everywhere"
