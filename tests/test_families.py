"""Every family through the whole compiler: exact counts, exact patterns, and decoding equal to torch."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from families import CAUSAL, FAMILIES, UPDATED, VOCABULARY, compile_family, stored_linears
from sparsify_export import compile as compiler
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes import mapped
from sparsify_export.passes.dialect.packed import op_name
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError, VerificationError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.recipe import Distil, Quantise, Tune
from sparsify_export.runtime import pieces
from sparsify_export.runtime.inspection import check_pattern
from sparsify_export.runtime.session import CausalSession, open_session, sparse_runs
from sparsify_export.runtime.verify import expect, verify

SLOW = {name: pytest.mark.slow for name in ("qwen3", "phi3")}
"""Families that are made of the same parts as others."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in FAMILIES])
def family(request, tmp_path_factory):
    return request.param, compile_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def compiled(family):
    return family[1]


def test_exactly_these_linears_are_pruned_and_folded(family):
    name, compiled = family
    wanted = FAMILIES[name]
    pruned = [linear for block in compiled.done.blocks for linear in block.linears if linear.pattern == "2:4"]
    assert len(pruned) == wanted.pruned
    assert sum(len(block.folds) for block in compiled.done.blocks) == wanted.folded
    assert [entry.op for entry in compiled.lowered].count("linear_nm") == wanted.pruned
    assert [entry.op for entry in compiled.lowered].count("MatMul") == wanted.dense
    assert all(fold.retained_after > fold.retained_before for block in compiled.done.blocks for fold in block.folds)
    if name in UPDATED:
        assert all(linear.error_after < linear.error_before for linear in pruned)
    else:
        assert all(linear.retained_after >= linear.retained_before for linear in pruned)


def test_file_holds_exactly_2_of_4_and_kept_weights_bit_for_bit(family):
    name, compiled = family
    count = check_pattern(compiled.path, NM(2, 4))
    assert count.weights == FAMILIES[name].ops
    linears = {linear.path: linear for part in compiled.parts.blocks for linear in part.linears}
    stored = stored_linears(compiled.path, lambda path: linears[path].out_features)
    assert stored.keys() == linears.keys()
    for path, weight in stored.items():
        source = compiled.source[linears[path].weight]
        assert torch.equal(weight, compiled.params[linears[path].weight])
        # Folds move rows and columns but change no value.
        assert bool(torch.isin(weight[weight != 0], source).all()) == (name not in UPDATED)
        assert not torch.signbit(weight[weight == 0]).any()


def test_file_equals_the_model_with_and_without_our_library_and_in_pieces(compiled, monkeypatch):
    expected = expect(compiled.parts, compiled.params, compiled.published(compiled.params))
    results = verify(compiled.path, compiled.traced, expected)
    assert {result.how.split(",")[0] for result in results} == {"kernels", "functions"}
    (data,) = compiled.path.parent.glob(f"{compiled.path.name}.*.data")
    monkeypatch.setattr(pieces, "MOST", data.stat().st_size // 2)
    in_pieces = verify(compiled.path, compiled.traced, expected, {"functions": False})
    assert [x.how.endswith("decoding") for x in in_pieces] == [
        x.how.endswith("decoding") for x in results[-len(in_pieces) :]
    ]
    assert all(" pieces" in result.how for result in in_pieces)
    if compiled.traced.kind == "causal":
        other = [replace(each, cache=tuple(-x for x in each.cache)) for each in expected]
        with pytest.raises(VerificationError, match=r"differs from the model \(functions, in \d+ pieces, decoding\)"):
            verify(compiled.path, compiled.traced, other, {"functions": False})


@pytest.mark.parametrize(
    ("name", "storage"), [("gpt2", FP32), pytest.param("llama", Storage("int4", 32), marks=pytest.mark.slow)]
)
def test_weights_that_lie_in_files_make_the_same_file(name, storage, tmp_path, monkeypatch):
    quantise = Quantise(storage, "sweep") if storage.quantised else None
    written = []
    for least in (1 << 30, 1):
        monkeypatch.setattr(mapped, "LEAST", least)
        folder = tmp_path / str(least)
        folder.mkdir()
        compiled = compile_family(name, folder, storage=storage, quantise=quantise)
        (data,) = folder.glob("*.data")
        written.append(data.read_bytes())
        linears = [linear.weight for part in compiled.parts.blocks for linear in part.linears]
        assert {mapped.is_mapped(compiled.params[key]) for key in linears} == {least == 1}
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bert"))])
def test_fine_tuning_keeps_the_pattern_and_mends_both_halves(name, tmp_path):
    tune = Tune(epochs=2, rate=0.02, tokens_per_step=40)
    plain, tuned = (compile_family(name, tmp_path, tune=choice) for choice in (None, tune))
    assert check_pattern(tuned.path, NM(2, 4)).weights == FAMILIES[name].ops
    for after in tuned.done.blocks:
        assert len(after.tuned) == 2
        assert {path for half in after.tuned for path in half.linears} == {linear.path for linear in after.linears}
        assert all(half.after <= half.before for half in after.tuned)
    # A block is fitted to the dense block on inputs that its tuned predecessors changed: one block alone may be a
    # little worse where tuning found next to nothing, all of them together are better.
    assert sum(block.error for block in tuned.done.blocks) < sum(block.error for block in plain.done.blocks)
    assert any(half.after < half.before for block in tuned.done.blocks for half in block.tuned)
    for key, weight in tuned.params.items():
        assert torch.equal(weight, plain.params[key]) or not torch.signbit(weight[weight == 0]).any()


@pytest.mark.parametrize(("name", "storage"), [("llama", Storage("int4", 32)), ("bert", FP32)], ids=["llama", "bert"])
def test_distillation_mends_the_output_and_the_file_holds_its_weights(name, storage, tmp_path):
    quantise = Quantise(storage, "joint") if storage.quantised else None
    compiled = compile_family(name, tmp_path, storage=storage, quantise=quantise, distil=Distil(epochs=2, rate=0.01))
    assert check_pattern(compiled.path, NM(2, 4)).weights == FAMILIES[name].ops
    floats, *on_grid = compiled.done.distilled
    assert floats.after < floats.before
    assert len(on_grid) == storage.quantised
    assert all(loss.after <= loss.before for loss in on_grid)
    assert len(compiled.done.on_grid) == (FAMILIES[name].pruned if storage.quantised else 0)
    stored = compiler.as_stored(compiled.params, compiled.packed)
    assert all(torch.equal(stored[key], compiled.params[key]) for key in compiled.done.on_grid)
    rounded = dict.fromkeys(compiled.packed, storage.activations)
    verify(compiled.path, compiled.traced, expect(compiled.parts, stored, compiled.published(stored), rounded))


@pytest.mark.parametrize(
    ("name", "pattern", "storage"),
    [
        ("llama", NM(2, 4), Storage("int8")),
        ("llama", NM(2, 4), Storage("bf16")),
        ("bert", Unstructured(0.5), Storage("bf16")),
        ("bert", Unstructured(0.5), Storage("int4", 32)),
    ],
    ids=["llama-int8", "llama-bf16", "bert-bf16", "bert-int4"],
)
def test_every_storage_is_verified_against_its_own_rounding(name, pattern, storage, tmp_path):
    compiled = compile_family(name, tmp_path, pattern=pattern, storage=storage)
    assert {entry.op for entry in compiled.lowered if not entry.reason} == {op_name(pattern, storage)}
    stored = compiler.as_stored(compiled.params, compiled.packed)
    rounded = dict.fromkeys(compiled.packed, storage.activations)
    expected = expect(compiled.parts, stored, compiled.published(stored), rounded)
    for result in verify(compiled.path, compiled.traced, expected):
        assert result.closeness.error < 0.05
    linears = {linear.path: linear for part in compiled.parts.blocks for linear in part.linears}
    weights = stored_linears(compiled.path, lambda path: linears[path].out_features)
    assert weights.keys() == linears.keys()
    for path, weight in weights.items():
        assert torch.equal(weight, stored[linears[path].weight])
    wrong = {key: value * 1.5 if key in compiled.packed else value for key, value in stored.items()}
    with pytest.raises(VerificationError, match="differs from the model"):
        verify(compiled.path, compiled.traced, expect(compiled.parts, wrong, compiled.published(wrong), rounded))


@pytest.mark.parametrize(
    ("name", "pattern", "quantise", "recipe"),
    [
        ("llama", NM(2, 4), Quantise(Storage("int4", 32), "joint"), {"tune": Tune(epochs=2, tokens_per_step=40)}),
        ("gpt2", NM(4, 8), Quantise(Storage("int4", 128)), {"update": "alps", "mask_from": "update"}),
        ("bert", Unstructured(0.5), Quantise(Storage("int8")), {}),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_the_file_holds_what_quantisation_made_bit_for_bit(name, pattern, quantise, recipe, tmp_path):
    storage = quantise.storage
    compiled = compile_family(name, tmp_path, pattern=pattern, storage=storage, quantise=quantise, **recipe)
    assert {entry.op for entry in compiled.lowered if not entry.reason} == {op_name(pattern, storage)}
    linears = {linear.path: linear for part in compiled.parts.blocks for linear in part.linears}
    weights = stored_linears(compiled.path, lambda path: linears[path].out_features)
    assert weights.keys() == linears.keys()
    assert all(torch.equal(weight, compiled.params[linears[path].weight]) for path, weight in weights.items())
    rounded = dict.fromkeys(compiled.packed, storage.activations)
    verify(
        compiled.path,
        compiled.traced,
        expect(compiled.parts, compiled.params, compiled.published(compiled.params), rounded),
    )


def test_kernels_run_with_the_library_and_functions_without(family, tmp_path):
    name, compiled = family
    feed = {n: x.numpy() for n, x in zip(compiled.traced.inputs, compiled.probe.inputs, strict=True)}
    for kernels, runs in ((True, {"linear_nm": FAMILIES[name].ops}), (False, {})):
        session = open_session(compiled.path, kernels=kernels, profile=tmp_path / "profile")
        session.run(None, feed)
        assert sparse_runs(session) == runs


def test_attention_reads_the_linears_and_the_cache_directly(family):
    name, compiled = family
    graph = onnx.load(compiled.path, load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attention) == 2
    for node in attention:
        assert {"q_num_heads", "kv_num_heads"} <= {a.name for a in node.attribute}
        assert len(node.output) == (3 if name in CAUSAL else 1)


def test_a_bare_onnx_runtime_opens_the_file(compiled):
    assert ort.InferenceSession(str(compiled.path), providers=["CPUExecutionProvider"]).get_inputs()


def test_decodes_24_tokens_like_torch_without_a_cache_at_batch_2_left_padded(family):
    name, compiled = family
    if name not in CAUSAL:
        pytest.skip("encoders do not decode")
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, VOCABULARY, (prompt + 24,), generator=generator) for prompt in (12, 7)]
    ids = torch.zeros(2, 12 + 24, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    session = CausalSession(open_session(compiled.path))
    logits, past = session.step(ids[:, :12].numpy(), mask[:, :12].numpy(), session.empty_past(2))
    got = [logits[:, -1:]]
    for end in range(13, 36):
        logits, past = session.step(ids[:, end - 1 : end].numpy(), mask[:, :end].numpy(), past)
        got.append(logits)
    decoded = torch.from_numpy(np.concatenate(got, axis=1))
    for row, text in enumerate(rows):
        with torch.no_grad():
            baseline = compiled.model(input_ids=text[None], use_cache=False).logits[:, -25:-1]
            exact = compiled.model.double()(input_ids=text[None], use_cache=False).logits[:, -25:-1]
        compiled.model.float()
        close = compare(decoded[row : row + 1], baseline, exact, factor=8.0)
        assert close.ok, close


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    with pytest.raises(InputError, match="encoder-decoder"):
        describe(transformers.T5ForConditionalGeneration(config))
