"""Tiny encoders of text and of pictures, and a tokenizer of 96 words that puts special tokens around a text."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as t
from families import VOCABULARY, WIDE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

SPECIAL = ("<pad>", "<cls>", "<sep>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
PICTURE = {"image_size": 32, "patch_size": 8}
MODELS = {
    "embedding": lambda: t.BertModel(t.BertConfig(**WIDE, **TEXT)),
    "classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**WIDE, **TEXT, num_labels=3)),
    "reranker": lambda: t.BertForSequenceClassification(t.BertConfig(**WIDE, **TEXT, num_labels=1)),
    "labels": lambda: t.BertForSequenceClassification(
        t.BertConfig(**WIDE, **TEXT, num_labels=3, problem_type="multi_label_classification")
    ),
    "tokens": lambda: t.BertForTokenClassification(t.BertConfig(**WIDE, **TEXT, num_labels=5)),
    "pictures": lambda: t.ViTForImageClassification(t.ViTConfig(**WIDE, **PICTURE, num_labels=4)),
    "picture states": lambda: t.ViTModel(t.ViTConfig(**WIDE, **PICTURE)),
}


def encoder(name: str) -> Any:
    """A model with seeded weights, larger than transformers draws them: with those it says the same of all."""
    torch.manual_seed(20261127)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.15))
    return model


def tokenizer() -> Any:
    """One token a word, ``<cls>`` in front of a text and ``<sep>`` behind it and behind the second of a pair."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    names = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def write_sentences(folder: Path, pooling: str = "mean", length: int | None = None) -> None:
    """What sentence-transformers keeps beside a model: pooling, and normalisation behind it."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}_tokens": True}))
    if length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
