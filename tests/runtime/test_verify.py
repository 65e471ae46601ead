"""Verification against the published model: what each check would have caught is put in, and is found."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from families import GROUPED, TEXT, VOCABULARY, WIDE
from onnx import numpy_helper
from sparsify_export.calibration_data import probes_of
from sparsify_export.passes.equivalence import compare_unproven
from sparsify_export.passes.errors import InputError, VerificationError
from sparsify_export.passes.frontend import trace as tracing
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.products import Turned
from sparsify_export.passes.lower import to_onnx
from sparsify_export.passes.onnx.spread import SpreadRotaryTables
from sparsify_export.runtime.published import ask, put_weights
from sparsify_export.runtime.session import CausalSession, open_session
from sparsify_export.runtime.verify import expect, verify
from sparsify_export.settings import Settings

SETTINGS = Settings(None)
SHIFTED = {**WIDE, **TEXT, "pad_token_id": 1, "type_vocab_size": 1}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)], "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
SHORT_AND_LONG = {**ORIGINAL, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS, **ORIGINAL}}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def seeded(make, seed=0):
    torch.manual_seed(seed)
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@dataclasses.dataclass
class Dense:
    """A model written as it is, with what verifies it."""

    model: object
    traced: object
    expected: list
    path: object


def dense(model, tmp_path):
    """Trace, ask the published model, write."""
    pretrained = describe(model)
    traced = trace(pretrained)
    canonicalise(traced.program)
    parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    probes = probes_of(traced, pretrained, [], None, SETTINGS)
    expected = expect(parts, params, [ask(model, traced, probe) for probe in probes])
    to_onnx(traced, tmp_path / "model.onnx", metadata={})
    return Dense(model, traced, expected, tmp_path / "model.onnx")


def texts(rows, length=17):
    """Padded texts of a batch, from the seed of its size."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - min(2 * row, length - 3) :] = 0
    mask[0] = 1
    return ids * mask, mask


ROTARY = {
    "eurobert": lambda: transformers.EuroBertModel(transformers.EuroBertConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForSequenceClassification(transformers.Qwen3Config(**GROUPED, num_labels=1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "eurobert"])
def test_rotary_encoders_take_any_batch_in_stock_onnx_runtime_and_with_the_library(name, tmp_path, monkeypatch):
    made = dense(seeded(ROTARY[name]), tmp_path)
    verify(made.path, made.traced, made.expected)
    for rows in (1, 2, 8):
        ids, mask = texts(rows)
        wanted = next(iter(tracing.encoded(made.model, {"input_ids": ids, "attention_mask": mask}).values()))
        for kernels in (False, True):
            session = open_session(made.path, kernels=kernels)
            got = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
            assert compare_unproven(got, wanted).ok
    # The fault put back: one table for all texts, which only one text can be run with.
    monkeypatch.setattr(SpreadRotaryTables, "call", lambda self, model: ir.passes.PassResult(model, False))
    broken = dense(seeded(ROTARY[name]), tmp_path)
    with pytest.raises(VerificationError, match=r"does not run \(kernels\) on inputs of shape \[2, 17\]: .*cos_cache"):
        verify(broken.path, broken.traced, broken.expected)


def test_positions_of_decoders_begin_where_the_model_begins(tmp_path, monkeypatch):
    config = transformers.RobertaConfig(**SHIFTED, is_decoder=True)

    def make():
        return transformers.RobertaForCausalLM(config)

    made = dense(seeded(make), tmp_path)
    assert made.traced.first == 2
    verify(made.path, made.traced, made.expected)
    ids = torch.arange(5, 25)[None]
    session = CausalSession(open_session(made.path))
    got, _ = session.step(ids.numpy(), np.ones_like(ids), session.empty_past(1))
    wanted = made.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert compare_unproven(torch.from_numpy(got), wanted).ok
    monkeypatch.setattr(tracing, "first_position", lambda model: 0)
    with pytest.raises(VerificationError, match="the traced graph differs from the model's own forward"):
        dense(seeded(make), tmp_path)


def test_a_model_of_16_bits_is_asked_in_float32_which_is_the_same_on_every_processor():
    """The numbers are those of 16 bits, how they are added up is not."""
    model = seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)))
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    key = "model.model.layers.0.mlp.up_proj.weight"
    weight = torch.full((GROUPED["hidden_size"], GROUPED["intermediate_size"]), 0.1, dtype=torch.float16)
    norm = model.model.norm.weight.detach().clone()
    put_weights(model, {key: weight}, {key: Turned((1,), (0,), tuple(weight.T.shape))})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight.t().float())
    assert torch.equal(model.model.norm.weight, norm.float())


def test_a_cache_that_drops_entries_is_found_by_the_generation_loop(tmp_path, monkeypatch):
    """Built from the configuration, layers of a sliding window forget, and the traced graph with them."""
    config = transformers.Gemma3TextConfig(**GROUPED, **SLIDING)
    made = dense(seeded(lambda: transformers.Gemma3ForCausalLM(config)), tmp_path)
    verify(made.path, made.traced, made.expected)
    lengths = {each.batch.inputs[0].shape[1] for each in made.expected}
    assert any(length - 8 < 16 < length for length in lengths)  # decoding itself crosses the window
    damaged = [dataclasses.replace(each, exact=(each.exact[0].roll(1, 1),)) for each in made.expected]
    with pytest.raises(VerificationError, match="differs from the model"):
        verify(made.path, made.traced, damaged)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED, **SHORT_AND_LONG)), 32),
        (
            lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    **{**GROUPED, "max_position_embeddings": 40},
                    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                )
            ),
            40,
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_rotary_tables_that_change_with_length_end_the_text_there(make, limit, tmp_path):
    made = dense(seeded(make), tmp_path)
    assert made.traced.limit == limit
    verify(made.path, made.traced, made.expected)
    session = CausalSession(open_session(made.path))
    ids = np.arange(limit, dtype=np.int64)[None] % VOCABULARY
    logits, past = session.step(ids, np.ones_like(ids), session.empty_past(1))
    wanted = made.model(input_ids=torch.from_numpy(ids)).logits
    assert compare_unproven(torch.from_numpy(logits), wanted).ok
    with pytest.raises(InputError, match="the model fails on a text of"):
        session.step(ids[:, :1], np.ones((1, limit + 1), np.int64), past)


# Run once with 30 seeds: 0 false alarms, 30 of 30 planted errors found.
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_one_label_classifier_passes_and_a_planted_error_of_a_thousandth_is_found(seed, tmp_path):
    config = transformers.BertConfig(**WIDE, **TEXT, num_labels=1, type_vocab_size=1)
    made = dense(seeded(lambda: transformers.BertForSequenceClassification(config), seed), tmp_path)
    verify(made.path, made.traced, made.expected)
    largest = max(float(each.exact[0].abs().max()) for each in made.expected)
    _add_to_output(made.path, 1e-3 * largest)
    with pytest.raises(VerificationError, match="differs from the model"):
        verify(made.path, made.traced, made.expected)


def _add_to_output(path, amount):
    """Move the bias of the classifier."""
    model = onnx.load(path)
    add = model.graph.node[-1]
    names = {x.name: x for x in model.graph.initializer}
    bias = next(names[name] for name in add.input if name in names)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(amount), bias.name))
    onnx.save(model, path)


def test_an_output_behind_the_first_is_verified_too(tmp_path):
    made = dense(seeded(lambda: transformers.BertModel(transformers.BertConfig(**WIDE, **TEXT))), tmp_path)
    verify(made.path, made.traced, made.expected)
    damaged = [dataclasses.replace(each, exact=(each.exact[0], each.exact[1] * 1.001)) for each in made.expected]
    with pytest.raises(VerificationError, match="differs from the model"):
        verify(made.path, made.traced, damaged)


OTHERS = {
    # A mask that is the same for every query.
    "layoutlm": lambda: transformers.LayoutLMModel(transformers.LayoutLMConfig(**WIDE, **TEXT)),
    # Products with transposed weights, one head of keys and values.
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
    ),
    # A table of positions that bounds past and sequence, and attention that is written out.
    "xglm": lambda: transformers.XGLMForCausalLM(
        transformers.XGLMConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            ffn_dim=128,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=128,
            attn_implementation="eager",
        )
    ),
    # Layers that share their weights: products of one module, so of one name.
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**WIDE, **TEXT, embedding_size=32)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x in ("layoutlm", "falcon") else []) for x in OTHERS]
)
def test_models_of_other_shapes_are_written_and_verified(name, tmp_path):
    made = dense(seeded(OTHERS[name]), tmp_path)
    verify(made.path, made.traced, made.expected)
    nodes = [node.name for node in onnx.load(made.path, load_external_data=False).graph.node]
    assert len(set(nodes)) == len(nodes)
