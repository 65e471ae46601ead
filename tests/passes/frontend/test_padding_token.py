"""A decoder that classifies texts needs a padding token to take two of them."""

import pytest
import torch
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.frontend.trace import trace
from transformers import LlamaConfig, LlamaForSequenceClassification

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("padding", [None, 0])
def test_without_a_padding_token_it_is_refused_in_a_sentence(padding, tmp_path):
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=padding)).save_pretrained(tmp_path)
    if padding is None:
        with pytest.raises(InputError, match=r"has no padding token, .*; set pad_token_id in its config.json$"):
            trace(load(str(tmp_path)))
    else:
        assert trace(load(str(tmp_path))).outputs == ("logits",)
