"""Keeping the cache in place, on a graph from text: against attention written out in float64."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.cache_in_place import KEY, KeepCacheInPlace, is_in_place

# 2 key heads for 4 query heads of size 8; q, k and v are made of the ids, the mask of both inputs.
BEFORE = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[B, S] input_ids, int64[B, T] attention_mask, float[B, S, 32] q, float[B, S, 16] k, float[B, S, 16] v,
    float[B, 2, P, 8] pk, float[B, 2, P, 8] pv)
    => (float[B, S, 32] y, float[B, 2, T, 8] nk, float[B, 2, T, 8] nv, int64[1] told)
{
    length = Shape <start = 2, end = 3> (pv)
    told = Identity (length)
    batch = Shape <end = 1> (pk)
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    none = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    new = Shape <start = 1> (input_ids)
    all = Add (length, new)
    t = Squeeze (all)
    keys = Range (none, t, step)
    s = Squeeze (new)
    fresh = Range (none, s, step)
    queries = Add (fresh, length)
    column = Unsqueeze (queries, one)
    causal = LessOrEqual (keys, column)
    seen = Cast <to = 9> (attention_mask)
    counted = Unsqueeze (seen, one)
    mask3 = And (causal, counted)
    mask = Unsqueeze (mask3, one)
    y, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.3>
        (q, k, v, mask, pk, pv)
}
"""
OUTPUTS = ["y", "present.0.key", "present.0.value", "told"]


def parsed(text):
    """The text's model, the caches by the names that decoders have."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    names = {"pk": "past_key_values.0.key", "pv": "past_key_values.0.value", "nk": "present.0.key", "nv": OUTPUTS[2]}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(value.name, value.name)
    return model


def in_place(text=BEFORE):
    model = parsed(text)
    assert KeepCacheInPlace()(model).modified
    return model


def session(model):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(*, batch, new, past, pads=()):
    """Normal numbers; ``pads`` says how many tokens at the front of each text are padding."""
    random = np.random.default_rng(1)
    mask = np.ones((batch, past + new), np.int64)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    drawn = {
        name: random.standard_normal((batch, new, size), np.float32)
        for name, size in {"q": 32, "k": 16, "v": 16}.items()
    }
    caches = {
        f"past_key_values.0.{part}": random.standard_normal((batch, 2, past, 8), np.float32)
        for part in ("key", "value")
    }
    return {"input_ids": np.zeros((batch, new), np.int64), "attention_mask": mask, **drawn, **caches}


def exact(given, dtype=torch.float64):
    """Attention from its definition: grouped heads, a mask that is causal and leaves padding out."""
    q, k, v = (torch.from_numpy(given[name]).to(dtype) for name in "qkv")
    batch, new, _ = q.shape
    heads = [x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k, v)]
    past = [torch.from_numpy(given[f"past_key_values.0.{part}"]).to(dtype) for part in ("key", "value")]
    keys, values = (torch.cat([a, b], dim=2).repeat_interleave(2, dim=1) for a, b in zip(past, heads[1:], strict=True))
    length = keys.shape[2]
    scores = 0.3 * heads[0] @ keys.mT
    causal = torch.arange(length) <= torch.arange(length - new, length)[:, None]
    seen = causal & torch.from_numpy(given["attention_mask"]).bool()[:, None, None]
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return y.transpose(1, 2).reshape(batch, new, 32)


@pytest.mark.parametrize(
    ("batch", "new", "past", "pads"),
    [(1, 1, 0, ()), (1, 1, 7, ()), (3, 5, 0, (0, 2, 4)), (2, 1, 6, (0, 3)), (1, 4, 9, ()), (1, 4, 9, (3,))],
)
def test_it_is_attention(batch, new, past, pads):
    given = feed(batch=batch, new=new, past=past, pads=pads)
    y, keys, values, told = session(in_place()).run(OUTPUTS, given)
    assert told.tolist() == [past]
    assert keys.shape == values.shape == (batch, 2, past + new, 8)
    counted = torch.from_numpy(given["attention_mask"][:, past:]).bool()  # what padding makes is read by nobody
    assert np.isfinite(y).all()
    close = compare(torch.from_numpy(y)[counted], exact(given, torch.float32)[counted], exact(given)[counted], factor=4)
    assert close.ok, close


@pytest.mark.parametrize("room", [1, 3, 20])
def test_in_a_buffer_with_room_it_is_the_same_and_what_was_there_stays(room):
    given = feed(batch=2, new=1, past=6, pads=(0, 3))
    runs = session(in_place())
    alone = runs.run(OUTPUTS, given)
    binding = runs.io_binding()
    for name, value in given.items():
        if name.startswith("past"):
            buffer = np.full((2, 2, 6 + room, 8), 7, np.float32)
            buffer[:, :, :6] = value
            shared = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), shared)
        else:
            binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    binding.bind_output("told")
    runs.run_with_iobinding(binding)
    keys, values, y, told = binding.copy_outputs_to_cpu()
    assert told.tolist() == [6]  # not what the buffer takes
    assert np.array_equal(y, alone[0])
    for shared, joined in ((keys, alone[1]), (values, alone[2])):
        assert np.array_equal(shared[:, :, :7], joined)
        assert (shared[:, :, 7:] == 7).all()


def test_a_mask_that_is_added_hides_as_well():
    added = BEFORE.replace(
        "    y, nk",
        "    low = Constant <value = float {-3.0e38}> ()\n    nought = Constant <value = float {0.0}> ()\n"
        "    given = Where (mask, nought, low)\n    y, nk",
    ).replace("v, mask, pk", "v, given, pk")
    given = feed(batch=2, new=3, past=0, pads=(0, 2))
    wanted = session(in_place()).run(OUTPUTS, given)
    for got, value in zip(session(in_place(added)).run(OUTPUTS, given), wanted, strict=True):
        assert np.array_equal(got, value)


def test_the_file_says_so():
    model = in_place()
    assert is_in_place(model.metadata_props)
    assert not is_in_place({})
    assert not is_in_place({KEY: "joined"})
    assert "Attention" not in {node.op_type for node in model.graph}


ATTENTION = "y, nk, nv = Attention"
REFUSED = {
    "its heads are split outside of it": BEFORE.replace("q_num_heads = 4, ", ""),
    "its keys and values are of different sizes, 4 and 8": BEFORE.replace(
        "float[B, 2, P, 8] pv", "float[B, 2, P, 4] pv"
    ),
    "its scores are read as well": BEFORE.replace(ATTENTION, ATTENTION.replace(" =", ", scores =")),
    "it is read by Relu": BEFORE.replace("    told", "    other = Relu (pk)\n    told"),
    "it is read by Shape": BEFORE.replace("Shape <end = 1>", "Shape"),
    "it is read by Other": BEFORE.replace("Attention <", "Other <"),
    "needs a decoder": BEFORE.replace("input_ids", "ids"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    model = parsed(REFUSED[why])
    with pytest.raises(InputError, match=why):
        KeepCacheInPlace()(model)
