"""Graphs that hold for one size only, or with a past only: found before anything is made of them, and said."""

import pytest
import torch
import transformers as t
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend import trace as tracing
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.frontend.untraceable import why_not

CHUNKED = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8, "num_hidden_layers": 1}


def mamba2():
    torch.manual_seed(0)
    return t.Mamba2ForCausalLM(t.Mamba2Config(vocab_size=96, hidden_size=32, **CHUNKED))


@pytest.mark.slow
def test_a_text_of_one_part_is_traced_with_more(monkeypatch):
    monkeypatch.setattr(tracing, "LENGTHS", (3, 20))
    model = mamba2()
    traced = trace(describe(model))
    for length in (5, 40):
        ids = torch.arange(length)[None] + 3
        got = traced.program.module(check_guards=False)(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_a_graph_of_one_length_is_refused(monkeypatch):
    monkeypatch.setattr(tracing, "LENGTHS", (3,))
    monkeypatch.setattr(tracing, "_holds", lambda *_: False)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(InputError, match="traced with 3 tokens, the graph of BertModel holds for no other number"):
        trace(describe(t.BertModel(t.BertConfig(vocab_size=96, **sizes))))


def test_a_place_is_told_where_an_error_says_nothing():
    def forward():
        assert sum([1]) == 2

    with pytest.raises(AssertionError) as caught:
        forward()
    caught.value.args = ()
    said = why_not("Model", caught.value)
    assert said.startswith("cannot be traced: AssertionError ('assert sum([1]) == 2")
    assert "test_untraceable.py line" in said
