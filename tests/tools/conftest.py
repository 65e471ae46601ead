"""A tiny language model on disk, and a text that its tokenizer knows."""

import numpy as np
import pytest
from families import VOCABULARY, random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of 96 words."""
    path = tmp_path_factory.mktemp("model") / "llama"
    random_model("llama").save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 600)))
    return path
