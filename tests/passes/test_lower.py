"""What is in the file: names, opset, functions, bytes; on a tiny decoder and a tiny encoder."""

import json

import numpy as np
import onnx
import pytest
import transformers
from families import FAMILIES, GROUPED, Family, compile_family
from onnx.external_data_helper import ExternalDataInfo
from sparsify_export.calibrate.patterns import Unstructured
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.onnx.protos import data_files
from sparsify_export.passes.onnx.write import INLINE

LAYER = "self_attn.q_proj+k_proj+v_proj self_attn.o_proj mlp.gate_proj+up_proj mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Grouped-query attention, pruned to 2:4."""
    return compile_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Tied embeddings of a vocabulary too large to be folded, nothing pruned."""
    config = transformers.Gemma3TextConfig(**{**GROUPED, "vocab_size": 512})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "tied", Family(lambda: transformers.Gemma3ForCausalLM(config), 0, 0, 0))
        return compile_family("tied", tmp_path_factory.mktemp("tied"), pattern=None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """No cache, pruned anywhere."""
    return compile_family("bert", tmp_path_factory.mktemp("bert"), pattern=Unstructured(0.6))


@pytest.fixture(scope="module", params=["llama", "gemma", "bert"])
def compiled(request):
    return request.getfixturevalue(request.param)


def load(compiled) -> onnx.ModelProto:
    return onnx.load(compiled.path, load_external_data=False)


def shapes(values) -> dict[str, list]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_inputs_outputs_and_axes_of_a_decoder(llama):
    graph = load(llama).graph
    past = {
        f"past_key_values.{i}.{x}": ["batch_size", 2, "past_sequence_length", 16]
        for i in (0, 1)
        for x in ("key", "value")
    }
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **past,
    }
    assert list(shapes(graph.input)) == ["input_ids", "attention_mask", *past]
    present = {n.replace("past_key_values", "present"): ["batch_size", 2, "total_sequence_length", 16] for n in past}
    assert shapes(graph.output) == {"logits": ["batch_size", "sequence_length", 96], **present}


def test_inputs_outputs_and_axes_of_an_encoder(bert):
    graph = load(bert).graph
    axes = ["batch_size", "sequence_length"]
    assert shapes(graph.input) == {"input_ids": axes, "attention_mask": axes, "token_type_ids": axes}
    assert shapes(graph.output) == {"logits": [*axes, 96]}


def test_the_checker_accepts_the_whole_file(compiled):
    onnx.checker.check_model(str(compiled.path), full_check=True)


def test_opset_23_and_our_domain_only_where_it_is_used(llama, gemma, bert):
    for compiled, wanted in ((llama, {"": 23, "sparsify": 1}), (bert, {"": 23, "sparsify": 1}), (gemma, {"": 23})):
        assert {o.domain: o.version for o in load(compiled).opset_import} == wanted


def test_function_bodies_of_the_ops_that_are_used_and_no_others(llama, gemma, bert):
    shared = {
        "linear_nm": ["dense_linear", "nm_weight"],
        "linear_bitmask": ["dense_linear", "mask_bits", "places", "spread"],
    }
    for compiled, wanted in ((llama, ["linear_nm"]), (bert, ["linear_bitmask"]), (gemma, [])):
        proto = load(compiled)
        called = [name for op in wanted for name in shared[op]]
        assert [(f.domain, f.name) for f in proto.functions] == [("sparsify", name) for name in [*wanted, *called]]
        assert {n.op_type for n in proto.graph.node if n.domain == "sparsify"} == set(wanted)
        assert {n.domain for n in proto.graph.node} <= {"", "sparsify"}


def test_metadata_says_where_it_came_from(llama):
    proto = load(llama)
    fields = {p.key: json.loads(p.value) for p in proto.metadata_props}
    checksums = fields.pop("sparsify.checksums")
    assert fields == {"sparsify.source": "llama"}
    assert checksums.keys() == {n.output[0] for n in proto.graph.node if n.domain == "sparsify"}
    assert proto.producer_name == "sparsify-export"


def test_linears_are_named_by_their_module(llama):
    nodes = load(llama).graph.node
    wanted = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LAYER.split()]
    assert sorted(n.name for n in nodes if n.op_type == "linear_nm") == sorted(wanted)
    assert "lm_head" in [n.name for n in nodes if n.op_type == "MatMul"]


def test_node_names_are_unique_and_nothing_of_the_trace_is_left(compiled):
    nodes = load(compiled).graph.node
    names = [n.name for n in nodes]
    assert len(set(names)) == len(names)
    assert not any(n.metadata_props or n.doc_string for n in nodes)


def test_every_offset_is_aligned_and_small_tensors_are_inline(compiled):
    (data,) = data_files(compiled.path)
    end = 0
    for tensor in load(compiled).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert len(onnx.numpy_helper.to_array(tensor).tobytes()) < INLINE
            continue
        place = ExternalDataInfo(tensor)
        assert place.location == data.name
        assert place.offset % 64 == 0
        assert 0 <= place.offset - end < 64
        end = place.offset + place.length
        assert place.length >= INLINE
    assert end == data.stat().st_size


def test_a_tied_embedding_is_stored_once(gemma):
    table = gemma.source["model.lm_head.weight"].numpy()
    data = data_files(gemma.path)[0].read_bytes()
    assert data.count(table.tobytes()) == 1
    assert np.ascontiguousarray(table.T).tobytes() not in data
    assert len(table) == 512


def test_heads_are_shared_by_the_attention_op(llama, gemma):
    for compiled in (llama, gemma):
        nodes = load(compiled).graph.node
        made_by = {name: node for node in nodes for name in node.output}
        attention = [node for node in nodes if node.op_type == "Attention"]
        assert len(attention) == 2
        for index, node in enumerate(attention):
            heads = {a.name: a.i for a in node.attribute if a.name.endswith("num_heads")}
            assert heads == {"q_num_heads": 4, "kv_num_heads": 2}
            assert [made_by[name].op_type for name in node.input[:3]] == ["RotaryEmbedding", "RotaryEmbedding", "Split"]
            assert list(node.input[4:]) == [f"past_key_values.{index}.{x}" for x in ("key", "value")]
            assert list(node.output[1:]) == [f"present.{index}.{x}" for x in ("key", "value")]


def test_norms_and_rotary_embeddings_are_single_ops(llama):
    kinds = [n.op_type for n in load(llama).graph.node]
    assert kinds.count("RMSNormalization") == 5
    assert kinds.count("RotaryEmbedding") == 4


def test_packed_values_are_stored_in_16_bits_and_the_rest_in_32(tmp_path):
    compiled = compile_family("opt", tmp_path, storage=Storage("bf16"))
    wanted = onnx.TensorProto.BFLOAT16
    proto = load(compiled)
    tensors = {t.name: t.data_type for t in proto.graph.initializer}
    sparse = [n for n in proto.graph.node if n.op_type == "linear_nm"]
    assert len(sparse) == FAMILIES["opt"].ops
    assert {tensors[n.input[1]] for n in sparse} == {wanted}
    assert wanted not in {kind for name, kind in tensors.items() if name not in {n.input[1] for n in sparse}}
    onnx.checker.check_model(str(compiled.path), full_check=True)


def test_the_same_settings_give_the_same_bytes(llama, tmp_path):
    again = compile_family("llama", tmp_path)
    first, second = ([file.read_bytes() for file in (c.path, *data_files(c.path))] for c in (llama, again))
    assert first == second
