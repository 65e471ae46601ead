"""A folder of a decoder in onnxruntime-genai itself: the same tokens, by our kernels."""

import json

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest
from families import CAUSAL, random_model
from onnx import TensorProto, helper
from sparsify_export.cli import main
from sparsify_export.genai_folder import CONFIG, write_genai
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.runtime import library_path, session
from sparsify_export.runtime.generate import generate
from sparsify_export.runtime.session import ROOM, SPARSE_OPS, CausalSession, open_session
from transformers import AutoTokenizer

PROMPTS = ["w1 w23 w4", "w5 w61"]


@pytest.fixture(scope="module")
def in_place(written, tmp_path_factory):
    """The same model, from its dense checkpoint, with a cache that stays in place."""
    dense, _ = written
    out = tmp_path_factory.mktemp("in_place") / "out"
    assert main([str(dense), "--cache", "in-place", "--quiet", "-o", f"{out}/"]) == 0
    return out


@pytest.mark.parametrize("cache", ["joined", "in place"])
def test_genai_writes_the_same_tokens_with_our_kernels(cache, request, tmp_path, monkeypatch):
    out = request.getfixturevalue("written")[1] if cache == "joined" else request.getfixturevalue("in_place")
    monkeypatch.chdir(tmp_path)
    config = genai.Config(str(out))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"enable_profiling": "ran"}}}}))
    model = genai.Model(config)
    reader, own = genai.Tokenizer(model), AutoTokenizer.from_pretrained(out)
    ids = [own(prompt).input_ids for prompt in PROMPTS]
    assert [reader.encode(prompt).tolist() for prompt in PROMPTS] == ids
    chat = [{"role": "user", "content": "w7"}]
    assert reader.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == own.apply_chat_template(
        chat, tokenize=False
    )
    longest = max(map(len, ids))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=longest + 64, batch_size=2)
    generator = genai.Generator(model, params)
    generator.append_tokens(reader.encode_batch(PROMPTS))
    written_by_genai: list[list[int]] = [[], []]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in enumerate(generator.get_next_tokens()):
            written_by_genai[row].append(int(token))
    ours = generate(CausalSession(open_session(out)), ids, max_new_tokens=64, eos=(2,))
    assert min(map(len, ours.tokens)) > 1
    for own_tokens, theirs in zip(ours.tokens, written_by_genai, strict=True):
        assert tuple(theirs[: len(own_tokens)]) == own_tokens
    del generator, params, reader, model  # the profile is written when nothing holds the model any more
    (profile,) = tmp_path.glob("ran*.json")
    events = json.loads(profile.read_text())
    assert {event["args"].get("op_name") for event in events if "args" in event} & set(SPARSE_OPS)


def test_a_cache_in_place_is_that_of_genai_and_the_texts_are_the_same(written, in_place):
    told = [json.loads((folder / CONFIG).read_text())["search"] for folder in (written[1], in_place)]
    assert [search["past_present_share_buffer"] for search in told] == [False, True]
    ids = [[5, 9, 44, 7], [8]]
    both = [generate(CausalSession(open_session(f)), ids, max_new_tokens=80) for f in (written[1], in_place)]
    assert both[0].tokens == both[1].tokens
    ops = {node.op_type for node in onnx.load(str(in_place / "model.onnx"), load_external_data=False).graph.node}
    assert "GroupQueryAttention" in ops
    assert "Attention" not in ops
    assert json.loads((in_place / "report.json").read_text())["settings"]["cache"] == "in-place"


def test_a_cache_in_place_writes_into_the_buffer_that_it_is_given(in_place):
    causal = CausalSession(open_session(in_place))
    ids = np.random.default_rng(3).integers(3, 90, (1, 9))
    _, past = causal.step(ids[:, :6], np.ones((1, 6), np.int64), causal.empty_past(1))
    assert {cache.shape()[2] for cache in past} == {ROOM}
    before = [cache.numpy().copy() for cache in past]
    logits, after = causal.step(ids[:, 6:], np.ones((1, 9), np.int64), past)
    assert all(new is old for new, old in zip(after, past, strict=True))
    for was, cache in zip(before, past, strict=True):
        assert np.array_equal(cache.numpy()[:, :, :6], was[:, :, :6])
        assert cache.numpy()[:, :, 6:9].any()
        assert not cache.numpy()[:, :, 9:].any()
    again, _ = causal.step(ids[:, 6:], np.ones((1, 9), np.int64), past)  # what is behind the 6 counts for nothing
    assert np.array_equal(again, logits)


def test_a_cache_in_place_grows(in_place, monkeypatch):
    monkeypatch.setattr(session, "ROOM", 16)
    causal = CausalSession(open_session(in_place))
    past = causal.random_past(2, 63)
    assert past[0].shape()[2] == 96  # half as many again, in steps of 16
    _, full = causal.step(np.full((2, 1), 5), np.ones((2, 96), np.int64), past)
    assert full[0] is past[0]
    _, grown = causal.step(np.full((2, 1), 5), np.ones((2, 97), np.int64), full)
    assert grown[0].shape()[2] == 144
    assert np.array_equal(grown[0].numpy()[:, :, :96], full[0].numpy())
    with pytest.raises(InputError, match="2 tokens of 2 texts behind a cache"):
        causal.step(np.full((2, 2), 5), np.ones((2, 99), np.int64), grown)


def test_what_genai_reads_is_in_the_folder(written):
    _, out = written
    told = json.loads((out / CONFIG).read_text())["model"]
    assert told["decoder"]["session_options"]["custom_ops_library"] == library_path().name
    assert (out / library_path().name).read_bytes() == library_path().read_bytes()
    assert (told["vocab_size"], told["context_length"], told["eos_token_id"]) == (96, 128, [2])
    sizes = [told["decoder"][name] for name in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    assert sizes == [2, 4, 16]
    report = json.loads((out / "report.json").read_text())
    assert {CONFIG, library_path().name} <= set(report["files"])
    assert report["genai"] == ""


def cached(folder, names, shapes):
    """A file that has these caches as inputs."""
    inputs = [
        helper.make_tensor_value_info(f"past_key_values.{name}", TensorProto.FLOAT, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 100])
    onnx.save(helper.make_model(helper.make_graph([], "g", inputs, [logits])), str(folder / "model.onnx"))
    return folder / "model.onnx"


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_of_decoders_has_what_genai_wants(name, tmp_path):
    assert (
        write_genai(describe(random_model(name)), cached(tmp_path, ["0.key", "0.value"], [["b", 2, "p", 16]] * 2)) == ""
    )
    told = json.loads((tmp_path / CONFIG).read_text())
    assert told["model"]["vocab_size"] == 100  # of the logits, which may be more than the tokenizer's
    assert told["model"]["eos_token_id"] == [2]
    assert None not in told["model"].values()
    assert told["search"]["max_length"] == told["model"]["context_length"] > 0


def test_what_genai_cannot_run_gets_no_configuration_and_a_reason(tmp_path):
    one = [["b", 2, "p", 16]] * 2
    llama = describe(random_model("llama"))
    names = ["0.key", "0.value"]
    assert "have one shape" in write_genai(llama, cached(tmp_path, names, [one[0], ["b", 1, "p", 32]]))
    assert "numbered from 0" in write_genai(llama, cached(tmp_path, ["1.key", "1.value"], one))
    llama.model.generation_config.eos_token_id = llama.model.config.eos_token_id = None
    assert "a token that ends a text" in write_genai(llama, cached(tmp_path, names, one))
    assert "runs decoders" in write_genai(describe(random_model("vit")), cached(tmp_path, [], []))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
