"""The models and texts that tests of the command begin with, as fixtures; their conftest.py names them."""

import json

import numpy as np
import pytest
from commands import SHORT
from families import VOCABULARY, random_model
from onnx_models import dense, mlp, saved
from sparsify_export.cli import main
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import PreTrainedTokenizerFast

CHAT = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What is measured of the machine is kept for all tests, and apart from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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
def images(tmp_path_factory):
    """A tiny model of images, which is compiled in half the time of one that writes text."""
    path = tmp_path_factory.mktemp("model") / "vit"
    random_model("vit").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 600)))
    return path


@pytest.fixture
def given(tmp_path):
    """An ONNX model of two linears."""
    return saved(mlp(dense(64, 64, 1), dense(64, 32, 2)), tmp_path, "given.onnx")


@pytest.fixture(scope="session")
def written(text, tmp_path_factory):
    """A checkpoint and a folder of a GPT-2, whose weights lie transposed and whose head is tied; folded and updated.

    Its tokenizer reads letters, and is of a kind that onnxruntime-genai knows. Beside them a repository of Triton.
    """
    given = tmp_path_factory.mktemp("gpt2") / "gpt2"
    random_model("gpt2").save_pretrained(given)
    letters = ["<unk>", "<s>", "</s>", "\u0120", *map(chr, range(33, 125))]
    words = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(given)
    told = json.loads((given / "tokenizer_config.json").read_text())
    (given / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": CHAT}))
    out = given.parent / "out"
    flags = ["--nm", "2:4", "--calibration", str(text), *SHORT, "-o", f"{out}/"]
    also = ["--also-checkpoint", str(out.parent / "dense"), "--triton", str(out.parent / "repository")]
    assert main([str(given), *flags, *also]) == 0
    return out.parent / "dense", out
