"""Sparse ops go in, everything else stays: metadata, doc strings, types, functions, branches."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import MICROSOFT, build, dense, mlp, node, rng, saved, sparse_kn
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.replace import describe, replace_linears
from sparsify_export.passes.onnx.sparse_linears import make_sparse
from sparsify_export.passes.onnx.spool import Spool
from sparsify_export.passes.onnx.view import read_model
from sparsify_export.passes.onnx.write import write_proto
from sparsify_export.passes.recipe import Recipe


def lower(proto, tmp_path, recipe=None, storage=FP32):
    """Lower a model; returns the result, what became of each linear, and what was left out."""
    path = saved(proto, tmp_path)
    model = read_model(path)
    linears, left = find_linears(model)
    packed, kept = (Spool(tmp_path / name, near=False) for name in ("packed", "dense"))
    sparse, still = make_sparse(model, linears, recipe, storage=storage, sparse_ops=True, packed=packed, dense=kept)
    replace_linears(model, sparse)
    out = tmp_path / "out.onnx"
    write_proto(model.proto, out, base=tmp_path, check=True)
    return onnx.load(str(out)), sparse, [*left, *still]


def run(path, feed):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)


def ops(proto):
    return [n.op_type for n in proto.graph.node]


SPARSE = sparse_kn(16, 8)


@pytest.mark.parametrize(
    "proto",
    [
        mlp(SPARSE),
        mlp(SPARSE, opset=11),
        mlp(SPARSE, ir=3),
        build([node("Gemm", ["x", "w"], ["y"], alpha=3.0)], {"x": ["t", 16]}, ["y"], {"w": SPARSE}),
        build(
            [node("Gemm", ["x", "w", "c"], ["y"], transB=1, beta=0.5)],
            {"x": ["t", 16]},
            ["y"],
            {"w": SPARSE.T.copy(), "c": np.float32(3)},
        ),
        build(
            [node("FusedMatMul", ["x", "w"], ["y"], alpha=0.3, transB=1, domain=MICROSOFT)],
            {"x": ["t", 16]},
            ["y"],
            {"w": SPARSE.T.copy()},
        ),
    ],
    ids=["MatMul", "opset 11", "IR 3", "alpha", "transB and beta", "FusedMatMul"],
)
def test_the_result_computes_the_same_in_stock_onnx_runtime(proto, tmp_path):
    result, sparse, left = lower(proto, tmp_path)
    assert "linear_nm" in ops(result)
    assert not {"MatMul", "Gemm", "FusedMatMul", "Add"} & set(ops(result))
    assert (len(sparse), left) == (1, [])
    x = rng(5).standard_normal((7, 16)).astype(np.float32)
    got, want = (torch.from_numpy(run(tmp_path / name, {"x": x})[0]) for name in ("out.onnx", "m.onnx"))
    weight = sparse[0].linear.weight.read().double() * sparse[0].linear.alpha
    exact = torch.from_numpy(x).double() @ weight.T
    bias = sparse[0].linear.bias
    if bias is not None:
        exact = exact + bias.factor * torch.from_numpy(numpy_helper.to_array(bias.proto).astype(np.float64))
    if "Relu" in ops(result):
        exact = exact.relu()
    close = compare(got, want, exact)
    assert close.ok, close


def test_everything_that_is_said_about_a_model_stays(tmp_path):
    proto = mlp(SPARSE, dense(8, 8))
    proto.producer_name, proto.producer_version, proto.domain = "tool", "1.2", "org.example"
    proto.model_version, proto.doc_string = 7, "the model"
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.doc_string = "the graph"
    proto.graph.metadata_props.add(key="graph", value="main")
    for n in proto.graph.node:
        n.doc_string = f"doc of {n.op_type}"
        n.metadata_props.add(key="namespace", value=f"layer/{n.output[0]}")
    proto.graph.input[0].doc_string = "the input"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    proto.graph.value_info.append(helper.make_tensor_value_info("r0", 1, ["batch", 8]))
    proto.graph.value_info.append(helper.make_tensor_value_info("m0", 1, ["batch", 8]))
    proto.graph.initializer[2].doc_string = "dense weight"
    imports = [helper.make_opsetid("", 18)]
    proto.functions.append(
        helper.make_function("own", "twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], imports)
    )
    proto.opset_import.append(helper.make_opsetid("own", 1))
    result, _, _ = lower(proto, tmp_path)
    *kept, ours = result.metadata_props
    assert (kept, ours.key) == ([*proto.metadata_props], "sparsify.checksums")
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(result, name) == getattr(proto, name), name
    for name in ("name", "doc_string", "metadata_props", "input", "output"):
        assert getattr(result.graph, name) == getattr(proto.graph, name), name
    assert [v.name for v in result.graph.value_info] == ["r0"]  # m0 is inside the sparse op now
    assert result.functions[0] == proto.functions[0]
    assert [f.name for f in result.functions] == ["twice", "linear_nm", "dense_linear", "nm_weight"]
    assert {(o.domain, o.version) for o in result.opset_import} == {("", 18), ("own", 1), ("sparsify", 1)}
    lowered, relu, *rest = result.graph.node
    assert (lowered.op_type, lowered.name, lowered.doc_string) == ("linear_nm", "fc0", "doc of MatMul")
    assert lowered.metadata_props[0].value == "layer/m0"
    assert [relu, *rest] == [n for n in proto.graph.node if n.output[0] in ("r0", "m1", "a1", "r1")]
    stored = {t.name: t for t in result.graph.initializer}
    assert set(stored) == {"b0", "w1", "b1", "w0.values", "w0.indices"}
    assert stored["w1"].doc_string == "dense weight"


def test_what_only_the_linear_read_goes_and_what_is_still_read_stays(tmp_path):
    nodes = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(SPARSE.T.copy())),
        node("Identity", ["c"], ["i"]),
        node("Transpose", ["i"], ["w"], perm=[1, 0]),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["y"]),
        node("Add", ["b", "b"], ["z"]),
    ]
    proto = build(nodes, {"x": ["t", 16]}, ["y", "z"], {"b": np.ones(8, np.float32)})
    result, _, _ = lower(proto, tmp_path)
    assert ops(result) == ["linear_nm", "Add"]
    assert list(result.graph.node[0].input) == ["x", "c.values", "c.indices", "b"]


def test_a_shared_weight_is_packed_once_and_once_more_for_another_factor(tmp_path):
    square = sparse_kn(16, 16)
    nodes = [
        node("Gemm", [a, "w"], [b], name=b, alpha=s) for a, b, s in (("x", "h", 1.0), ("h", "i", 1.0), ("i", "y", 2.0))
    ]
    result, sparse, _ = lower(build(nodes, {"x": ["t", 16]}, ["y"], {"w": square}), tmp_path)
    inputs = [list(n.input)[1] for n in result.graph.node]
    assert inputs == ["w.values", "w.values", "w.1.values"]
    assert len(sparse) == 3


def test_names_that_are_taken_are_not_used_again(tmp_path):
    proto = mlp(SPARSE)
    proto.graph.node.append(node("Identity", ["r0"], ["w0.values"]))
    result, _, _ = lower(proto, tmp_path)
    assert list(result.graph.node[0].input) == ["x", "w0.values.2", "w0.indices", "b0"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_sixteen_bits_are_kept_and_cast_around_the_op(tmp_path, kind):
    proto = build([node("MatMul", ["x", "w"], ["y"], name="fc")], {"x": ["t", 16]}, ["y"], {}, kind=kind)
    proto.graph.initializer.append(helper.make_tensor("w", kind, SPARSE.shape, SPARSE.reshape(-1)))
    result, sparse, _ = lower(proto, tmp_path)
    assert ops(result) == ["Cast", "linear_nm", "Cast"]
    assert sparse[0].packed[0].data_type == kind
    assert result.graph.node[2].attribute[0].i == kind


def test_linears_in_a_branch_are_lowered_there(tmp_path):
    def branch(name, weight):
        out = helper.make_tensor_value_info(name, 1, None)
        stored = [numpy_helper.from_array(weight, f"w_{name}")]
        return helper.make_graph([node("MatMul", ["x", f"w_{name}"], [name], name=name)], name, [], [out], stored)

    choice = node("If", ["c"], ["y"], then_branch=branch("t", SPARSE), else_branch=branch("e", dense(16, 8)))
    proto = build([choice], {"x": [3, 16]}, ["y"], {})
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    result, sparse, left = lower(proto, tmp_path)
    assert [entry.linear.path for entry in sparse] == ["t"]
    assert [(entry.path, entry.reason) for entry in left] == [("e", "the weight is dense")]
    x = np.ones((3, 16), np.float32)
    for choose in (True, False):
        feed = {"x": x, "c": np.array(choose)}
        got, want = (run(tmp_path / name, feed)[0] for name in ("out.onnx", "m.onnx"))
        exact = torch.from_numpy(x).double() @ torch.from_numpy(SPARSE if choose else dense(16, 8)).double()
        close = compare(torch.from_numpy(got), torch.from_numpy(want), exact)
        assert close.ok, close
    assert not {t.name for t in result.graph.initializer}


def test_pruning_gives_exact_counts_and_keeps_the_head(tmp_path):
    weights = dense(16, 32, 1), dense(32, 8, 2)
    proto = mlp(*weights)
    del proto.graph.node[-1]  # the last Relu: what it read is the output now
    proto.graph.output[0].name = "a1"
    _, sparse, left = lower(proto, tmp_path, Recipe(NM(2, 4), permute="none"))
    assert [entry.linear.path for entry in sparse] == ["fc0"]
    assert sparse[0].sparsity == 0.5
    assert 0.5 < sparse[0].retained < 1
    assert [(x.path, x.reason) for x in left] == [("fc1", "it gives the model's output, which is not pruned")]
    _, sparse, _ = lower(mlp(*weights), tmp_path, Recipe(Unstructured(0.6), permute="none"))
    assert [entry.sparsity for entry in sparse] == [307 / 512, 154 / 256]


def test_skip_and_shapes_that_do_not_fit(tmp_path):
    proto = mlp(dense(16, 18), dense(18, 8), dense(8, 8))
    _, sparse, left = lower(proto, tmp_path, Recipe(NM(2, 4), permute="none", skip=("fc2",)))
    assert [x.linear.path for x in sparse] == ["fc0"]
    assert [(x.path, x.reason) for x in left] == [
        ("fc1", "in_features 18 is not a multiple of 4"),
        ("fc2", "skipped by --skip"),
    ]
    with pytest.raises(InputError, match=r"--skip nothing matches none of the 3 linears, e\.g\. fc0"):
        lower(proto, tmp_path, Recipe(NM(2, 4), permute="none", skip=("nothing",)))
    with pytest.raises(InputError, match=r"no linear of .* can be pruned; fc0: skipped"):
        lower(mlp(dense(16, 8)), tmp_path, Recipe(NM(2, 4), permute="none", skip=("*",)))


def test_a_quantised_weight_is_lowered_only_where_that_is_smaller(tmp_path):
    for keep, lowered in ((1, True), (2, False)):
        values = rng().integers(1, 100, (64, 32)).astype(np.int8)
        values[np.arange(64) % 4 >= keep] = 0
        nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"], name="fc")]
        weights = {"w": values, "s": np.full(32, 2.0**-7, np.float32)}
        proto = build(nodes, {"x": ["t", 64]}, ["y"], weights)
        result, _, left = lower(proto, tmp_path, storage=Storage("bf16"))
        assert (ops(result) == ["linear_nm"]) is lowered
        assert (
            lowered
            or left[0].reason
            == "packed it would take 2304 bytes, now 2176; --dtype int8 or int4 stores it as the model does"
        )


def test_nan_is_refused_by_name(tmp_path):
    weight = SPARSE.copy()
    weight[0, 0] = np.nan
    with pytest.raises(InputError, match="fc0: its weight holds NaN or infinity"):
        lower(mlp(weight), tmp_path)


def test_a_value_too_large_for_the_storage_is_refused(tmp_path):
    weight = SPARSE.copy()
    weight[0, 0] = 1e6
    with pytest.raises(InputError, match="fc0: 1e\\+06 does not fit float16"):
        lower(mlp(weight), tmp_path, storage=Storage("fp16"))


def test_metadata_is_added_and_its_own_replaced(tmp_path):
    proto = mlp(SPARSE)
    proto.metadata_props.add(key="sparsify.settings", value="older")
    proto.metadata_props.add(key="author", value="someone")
    model = read_model(saved(proto, tmp_path))
    describe(model, {"settings": {"a": 1}})
    assert {p.key: p.value for p in model.proto.metadata_props} == {
        "author": "someone",
        "sparsify.settings": '{"a": 1}',
    }


def test_bf16_needs_an_opset_that_has_it(tmp_path):
    with pytest.raises(InputError, match="uses ONNX opset 12, which cannot read bf16; want 13 or newer, or fp16"):
        lower(mlp(SPARSE, opset=12), tmp_path, storage=Storage("bf16"))
    lower(mlp(SPARSE, opset=13), tmp_path, storage=Storage("bf16"))
