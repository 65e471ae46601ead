"""A text begins with what its own tokenizer puts there, once, wherever text is read."""

import pytest
import torch
from families import random_model
from sparsify_export.passes.frontend.batches import read_windows, written_by_itself
from sparsify_export.passes.frontend.first_token import first_token, tokens_of
from sparsify_export.passes.frontend.load import describe
from sparsify_export.runtime.exact import _tokens, make_problems
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def tokenizer(template=None):
    """Words ``a`` to ``e``; the template is what is put around a text."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcde"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        words.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


ADDS, ADDS_BOTH, ADDS_NONE = tokenizer("<s> $A"), tokenizer("<s> $A </s>"), tokenizer()


def test_the_rule_is_the_tokenizers_own():
    assert first_token(ADDS) == first_token(ADDS_BOTH) == 1
    assert first_token(ADDS_NONE) is None
    assert first_token(tokenizer("$A </s>")) is None


def test_it_is_there_once_and_nothing_stands_behind():
    assert tokens_of(ADDS_BOTH, "a b", 1) == [1, 3, 4]
    assert tokens_of(ADDS_BOTH, "<s> a b", 1) == [1, 3, 4]
    assert tokens_of(ADDS_BOTH, "a b", None) == [3, 4]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a b c d e a")
    return file


def test_every_window_begins_with_it(path):
    assert read_windows(path, ADDS, samples=None, length=3).tolist() == [[1, 3, 4], [1, 5, 6], [1, 7, 3]]
    assert read_windows(path, ADDS, samples=2, length=100).tolist() == [[1, 3, 4, 5, 6, 7, 3]]
    without = [[3, 4, 5], [6, 7, 3]]
    assert read_windows(path, ADDS, samples=None, length=3, bos=False).tolist() == without
    assert read_windows(path, ADDS_NONE, samples=None, length=3).tolist() == without


def test_what_a_model_writes_itself_begins_with_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = random_model("llama")
    assert model.config.bos_token_id == 1
    kept, dropped, none = (
        written_by_itself(describe(model, words), samples=3, length=8, seed=0, bos=bos)
        for words, bos in ((ADDS, True), (ADDS, False), (ADDS_NONE, True))
    )
    assert kept.shape == dropped.shape == (3, 8)
    assert kept[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(kept[:, 1:], dropped[:, :-1])  # the same text, begun at the token or behind it
    assert torch.equal(none, dropped)


def test_exact_answers_begin_with_it():
    problem = make_problems(count=1)[0]
    with_it, start = _tokens(ADDS, problem, 1)
    without, earlier = _tokens(ADDS, problem, None)
    assert with_it == [1, *without]
    assert start == earlier + 1
