"""Models that write text and keep no KV cache, or that padding changes: what they are taken for, and verified as."""

import pytest
import torch
import transformers as t
from families import TEXT, WIDE
from sparsify_export.calibration_data import probes_of
from sparsify_export.passes.errors import VerificationError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.positions import bears_padding
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.runtime.published import ask
from sparsify_export.runtime.verify import expect
from sparsify_export.settings import Settings


def made(make, **config):
    torch.manual_seed(0)
    return make(config).eval().requires_grad_(False)


def bert(**config):
    return made(lambda config: t.BertLMHeadModel(t.BertConfig(**WIDE, **TEXT, **config)), **config)


def bart():
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    return made(lambda _: t.BartForCausalLM(t.BartConfig(**sizes, **TEXT, pad_token_id=0, init_std=0.2)))


def probed(model):
    pretrained = describe(model)
    traced = trace(pretrained)
    return pretrained, traced, probes_of(traced, pretrained, [], None, Settings(None))


def check(model, traced, probes):
    canonicalise(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    expect(partition(traced.program), params, [ask(model, traced, probe) for probe in probes])


def test_one_that_is_configured_to_look_ahead_takes_whole_texts():
    model = bert()
    pretrained, traced, probes = probed(model)
    assert pretrained.kind == "encoder"
    assert pretrained.notes == (
        "BertLMHeadModel looks ahead as it is configured, so the file takes whole texts and cannot write one",
    )
    assert traced.outputs == ("logits",)
    check(model, traced, probes)


def test_the_same_as_a_decoder_has_one():
    pretrained = describe(bert(is_decoder=True))
    assert pretrained.kind == "causal"
    assert pretrained.cache == ((4, 16, 16),) * 2


def test_a_state_of_another_kind_is_named():
    config = t.RwkvConfig(vocab_size=96, context_length=64, hidden_size=32, num_hidden_layers=2)
    pretrained = describe(made(lambda _: t.RwkvForCausalLM(config)))
    assert pretrained.kind == "encoder"
    assert "RwkvForCausalLM keeps a state that is not a KV cache: its forward takes no cache" in pretrained.notes[0]


def test_positions_that_count_padding_are_verified_without_any():
    model = bart()
    assert not bears_padding(model)
    assert bears_padding(bert(is_decoder=True))
    _, traced, probes = probed(model)
    assert all(bool(probe.token_mask.all()) for probe in probes)
    check(model, traced, probes)
    ids, mask, *past = probes[1].inputs
    padded = mask.clone()
    padded[1, :3] = 0
    probe = type(probes[1])((ids, padded, *past), padded.bool(), probes[1].cached)
    with pytest.raises(VerificationError, match="differs from the model's own forward"):
        check(model, traced, [probe])
