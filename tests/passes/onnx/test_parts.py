"""A fused product in a file is pruned as the linears that it is made of."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import MICROSOFT, build, dense, node, saved
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.storage import FP32
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.parts import parts_of
from sparsify_export.passes.onnx.sparse_linears import make_sparse
from sparsify_export.passes.onnx.spool import Spool
from sparsify_export.passes.onnx.view import read_model
from sparsify_export.passes.parts import ONE, Parts
from sparsify_export.passes.recipe import Recipe

WIDTH, HEADS, HEAD = 24, 4, 6
MAX = 2**63 - 1
BY_HEAD = Parts((HEAD, HEAD, HEAD), HEADS)
APART = Parts((WIDTH, WIDTH, WIDTH))


def slices(name, *ends):
    """One Slice of the last axis for each range; the last one to the end."""
    begins = [0, *ends[:-1]]
    nodes = [node("Slice", [name, f"b{b}", f"e{e}", "last"], [f"s{b}"]) for b, e in zip(begins, ends, strict=True)]
    numbers = {f"b{b}": np.array([b]) for b in begins} | {f"e{e}": np.array([e]) for e in ends}
    return nodes, numbers | {"last": np.array([-1])}


def shape(*numbers):
    return {"shape": np.array(numbers)}


GATHERS = [node("Gather", ["h", f"i{i}"], [f"p{i}"], axis=3) for i in range(3)]
INDICES = {f"i{i}": np.array(i) for i in range(3)}
VIEW = node("Reshape", ["y", "shape"], ["h"])
SPLIT3 = ["q", "k", "v"]
COMPUTED = [
    node("Shape", ["x"], ["all"]),
    node("Gather", ["all", "zero"], ["rows"], axis=0),
    node("Gather", ["all", "one"], ["tokens"], axis=0),
    node("Concat", ["rows", "tokens", "heads", "group"], ["shape"], axis=0),
]
LAYOUTS = {
    "Split": ([node("Split", ["y", "sizes"], SPLIT3, axis=-1)], {"sizes": np.array([24, 24, 24])}, APART),
    "Split, uneven": (
        [node("Split", ["y", "sizes"], ["q", "k"], axis=2)],
        {"sizes": np.array([60, 12])},
        Parts((60, 12)),
    ),
    "Split by number": ([node("Split", ["y"], SPLIT3, axis=-1, num_outputs=3)], {}, APART),
    "Slice": (*slices("y", WIDTH, 2 * WIDTH, MAX), APART),
    "behind a reshape that changes nothing": (
        [VIEW, node("Split", ["h"], SPLIT3, axis=-1, num_outputs=3)],
        shape(0, 0, -1),
        APART,
    ),
    "BLOOM": ([VIEW, *GATHERS], shape(0, 0, HEADS, 3, HEAD) | INDICES, BY_HEAD),
    "GPT-NeoX": (
        [
            *COMPUTED,
            VIEW,
            node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
            node("Split", ["t"], SPLIT3, axis=-1, num_outputs=3),
        ],
        {
            "zero": np.array([0]),
            "one": np.array([1]),
            "heads": np.array([-1]),
            "group": np.array([3 * HEAD]),
        },
        BY_HEAD,
    ),
    "ViT": (
        [
            VIEW,
            node("Transpose", ["h"], ["t"], perm=[2, 0, 3, 1, 4]),
            node("Split", ["t"], SPLIT3, axis=0, num_outputs=3),
        ],
        shape(0, 0, 3, HEADS, HEAD),
        APART,
    ),
    "rotary positions": (
        [VIEW, node("Split", ["h"], ["q", "k"], axis=-1, num_outputs=2)],
        shape(0, 0, 3 * HEADS, HEAD),
        ONE,
    ),
    "something reads all": (
        [node("Split", ["y"], SPLIT3, axis=-1, num_outputs=3), node("Relu", ["y"], ["r"])],
        {},
        ONE,
    ),
    "ranges that overlap": (slices("y", 48, MAX)[0] + [node("Slice", ["y", "b0", "e", "last"], ["o"])],
        slices("y", 48, MAX)[1] | {"e": np.array([50])}, ONE),
    "tokens are split": ([node("Split", ["y"], ["q", "k"], axis=-2, num_outputs=2)], {}, ONE),
    "sizes that are computed": ([node("Split", ["y", "sizes"], SPLIT3, axis=-1)], {}, ONE),
}  # fmt: skip


def fused(layout, weight):
    """A product, what reads it, and an output of every piece, so that none is an output of the product itself."""
    nodes, numbers, _ = LAYOUTS[layout]
    inputs = {"x": ["batch", 4, WIDTH]}
    proto = build([node("MatMul", ["x", "w"], ["y"], name="fc"), *nodes], inputs, [], {"w": weight} | numbers)
    if layout == "sizes that are computed":
        proto.graph.input.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [3]))
    made, read = ([x for n in proto.graph.node for x in getattr(n, side)] for side in ("output", "input"))
    ends = [name for name in made if name not in read]
    proto.graph.node.extend(node("Neg", [name], [f"{name}.out"]) for name in ends)
    proto.graph.output.extend(helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None) for name in ends)
    return proto


def pruned(proto, folder, pattern):
    """The weights ``[out, in]`` as pruned, by the name of the product."""
    folder.mkdir()
    model = read_model(saved(proto, folder))
    linears, _ = find_linears(model)
    spools = {name: Spool(folder / name, near=False) for name in ("packed", "dense")}
    sparse, _ = make_sparse(model, linears, Recipe(pattern), storage=FP32, sparse_ops=True, **spools)
    found = {}
    for entry in sparse:
        raw = (folder / "dense").read_bytes()
        at = {e.key: e.value for e in entry.dense.external_data}
        values = np.frombuffer(raw, np.float32, offset=int(at.get("offset", 0)), count=int(np.prod(entry.dense.dims)))
        found[entry.linear.path] = torch.from_numpy(values.reshape(entry.dense.dims).T.copy())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_graph_tells_what_a_product_is_made_of(layout, tmp_path):
    model = read_model(saved(fused(layout, dense(WIDTH, 3 * WIDTH)), tmp_path))
    linears, _ = find_linears(model)
    assert parts_of(model, linears) == LAYOUTS[layout][2]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("layout", ["Split", "BLOOM", "GPT-NeoX"])
def test_it_is_pruned_as_three_linears_of_their_own(layout, pattern, tmp_path):
    """By RIA, for which a weight's share of its column is that of one linear: v is fifty times as large as k."""
    apart = [scale * dense(WIDTH, WIDTH, seed) for seed, scale in enumerate((1.0, 0.1, 5.0))]  # [K, N]
    nodes = [node("MatMul", ["x", f"w{i}"], [f"m{i}"], name=f"fc{i}") for i in range(3)]
    nodes += [node("Relu", [f"m{i}"], [f"r{i}"]) for i in range(3)]
    names = {f"w{i}": weight for i, weight in enumerate(apart)}
    inputs = {"x": ["batch", 4, WIDTH]}
    alone = pruned(build(nodes, inputs, ["r0", "r1", "r2"], names), tmp_path / "apart", pattern)
    columns = np.stack(apart, axis=1)  # [K, 3, heads x head]
    if layout != "Split":
        columns = columns.reshape(WIDTH, 3, HEADS, HEAD).transpose(0, 2, 1, 3)
    weight = np.ascontiguousarray(columns.reshape(WIDTH, 3 * WIDTH))
    (together,) = pruned(fused(layout, weight), tmp_path / "fused", pattern).values()
    for each, wanted in zip(LAYOUTS[layout][2].split(together), alone.values(), strict=True):
        assert torch.equal(each, wanted)


def test_group_query_attention_takes_three_in_one(tmp_path):
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="fc"),
        node("GroupQueryAttention", ["y", "", "", "", "", "lengths", "total"], ["o"], num_heads=4, kv_num_heads=2,
             domain=MICROSOFT),
    ]  # fmt: skip
    proto = build(nodes, {"x": ["batch", 4, WIDTH]}, ["o"], {"w": dense(WIDTH, 48)})
    numbers = {"lengths": np.array([3], np.int32), "total": np.array(4, np.int32)}
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in numbers.items())
    model = read_model(saved(proto, tmp_path))
    assert parts_of(model, find_linears(model)[0]) == Parts((24, 12, 12))


def test_an_attribute_says_the_sizes_before_opset_13(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Split", ["y"], ["q", "k"], axis=-1, split=[48, 24])]
    nodes += [node("Neg", ["q"], ["a"]), node("Neg", ["k"], ["b"])]
    proto = build(nodes, {"x": ["batch", 4, WIDTH]}, ["a", "b"], {"w": dense(WIDTH, 72)}, opset=11)
    model = read_model(saved(proto, tmp_path))
    assert parts_of(model, find_linears(model)[0]) == Parts((48, 24))


def test_readers_that_disagree_leave_a_shared_weight_whole(tmp_path):
    nodes = [
        node("MatMul", ["x", "w"], ["y"]),
        node("Split", ["y"], ["q", "k"], axis=-1, num_outputs=2),
        node("MatMul", ["q", "w"], ["z"]),
        node("Relu", ["z"], ["r"]),
        node("Neg", ["k"], ["n"]),
    ]
    proto = build(nodes, {"x": ["batch", 4, WIDTH]}, ["r", "n"], {"w": dense(WIDTH, 2 * WIDTH)})
    model = read_model(saved(proto, tmp_path))
    linears, _ = find_linears(model)
    assert len(linears) == 2
    assert parts_of(model, linears) == ONE
