"""Models that no file of open sizes can hold, or that have no linears: one true sentence each."""

import pytest
import torch
import transformers as t
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition


def test_funnel_whose_pooling_fixes_the_length():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1}
    model = t.FunnelForSequenceClassification(t.FunnelConfig(vocab_size=96, **sizes))
    with pytest.raises(InputError, match=r"the code of FunnelForSequenceClassification makes a constant of the length"):
        trace(describe(model))


def test_squeezebert_whose_products_are_convolutions():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    groups = {f"{name}_groups": 2 for name in ("q", "k", "v", "intermediate", "output", "post_attention")}
    config = t.SqueezeBertConfig(vocab_size=96, num_attention_heads=2, **sizes, **groups)
    traced = trace(describe(t.SqueezeBertForSequenceClassification(config)))
    canonicalise(traced.program)
    with pytest.raises(InputError, match=r"no repeated layers with linear weights \(12 convolutions, which stay"):
        partition(traced.program)
