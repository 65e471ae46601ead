"""Embeddings: pooling by hand, padding that changes nothing, what a folder says, a file like its model."""

import json
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from families import random_model
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.cli import main
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.embedding import Embedder, Pooling, embed, onnx_hidden, pool, pooling_of, torch_hidden

STATES = np.array([[[1, 8], [3, 0], [5, 1]], [[9, 9], [2, 4], [4, 4]]], np.float32)
MASK = np.array([[1, 1, 0], [0, 1, 1]])  # padded behind, padded in front


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean", [[2, 4], [3, 4]]),
        ("max", [[3, 8], [4, 4]]),
        ("cls", [[1, 8], [2, 4]]),
        ("lasttoken", [[3, 0], [4, 4]]),
    ],
)
def test_pooling_by_hand(mode, expected):
    assert pool(STATES, MASK, Pooling(mode, normalise=False)).tolist() == expected
    unit = pool(STATES, MASK, Pooling(mode))
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)


def test_a_vector_of_zeros_stays_one():
    assert pool(np.zeros((1, 2, 3), np.float32), np.ones((1, 2), np.int64), Pooling()).tolist() == [[0, 0, 0]]


class Words:
    """A tokenizer of numbers."""

    model_max_length = 10**30
    pad_token_id = 0

    def __init__(self, padding_side="right"):
        self.padding_side = padding_side

    def __call__(self, texts, *, verbose, truncation=False, max_length=None):
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


TABLE = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)


@given(st.lists(st.lists(st.integers(1, 29), min_size=1, max_size=9), min_size=1, max_size=70), st.booleans())
def test_an_embedding_does_not_depend_on_the_other_texts(texts, left):
    embedder = Embedder(lambda arrays: TABLE[arrays["input_ids"]], ["input_ids"], Words("left" if left else "right"))
    together = embed(embedder, [" ".join(map(str, text)) for text in texts])
    for text, vector in zip(texts, together, strict=True):
        mean = TABLE[text].astype(np.float64).mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=2e-4, atol=1e-5)


def test_long_texts_are_cut_and_prefixes_put_in_front():
    embedder = Embedder(
        lambda arrays: TABLE[arrays["input_ids"]], ["input_ids"], Words(), Pooling("lasttoken", False, length=3)
    )
    assert embed(embedder, ["1 2 3 4"]).tolist() == TABLE[[3]].tolist()
    assert embed(embedder, ["1 2 3 4"], prefix="7 ").tolist() == TABLE[[2]].tolist()


def test_embeddings_that_are_not_finite_are_refused():
    embedder = Embedder(lambda arrays: TABLE[arrays["input_ids"]] * np.nan, ["input_ids"], Words())
    with pytest.raises(InputError, match="not finite"):
        embed(embedder, ["1"])


def folder_of(path, modules, pooling=None, **files):
    path.mkdir(exist_ok=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_cls_token": True}))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALISE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def test_a_folder_says_how_texts_are_pooled(tmp_path):
    assert pooling_of(tmp_path) == Pooling("mean", normalise=True)
    assert pooling_of(folder_of(tmp_path / "a", [TRANSFORMER, POOLING])) == Pooling("cls", normalise=False)
    said = pooling_of(
        folder_of(
            tmp_path / "b",
            [TRANSFORMER, POOLING, NORMALISE],
            {"pooling_mode": "lasttoken"},
            sentence_bert_config={"max_seq_length": 64},
            config_sentence_transformers={"prompts": {"query": "find: ", "passage": "text: "}},
        )
    )
    assert said == Pooling("lasttoken", True, 64, "find: ", "text: ")
    assert str(said) == "pooled by lasttoken, normalised, 64 tokens at most"


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([TRANSFORMER, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], None, "module 'Dense'"),
        ([POOLING], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by .*cls.*mean"),
        ([POOLING], {"pooling_mode_weightedmean_tokens": True}, "pools by pooling_mode_weightedmean_tokens"),
        ([POOLING], {"word_embedding_dimension": 3}, "pools by None"),
        ([{"path": "../x", "type": "Pooling"}], None, "want folders inside"),
        ({"a": 1}, None, "is not a list of modules"),
    ],
)
def test_other_modules_are_refused(tmp_path, modules, pooling, message):
    with pytest.raises(InputError, match=message):
        pooling_of(folder_of(tmp_path / "a", modules, pooling))


def test_a_file_embeds_as_the_model_it_was_made_from(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(random_model("bert").config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "bert")
    assert main([str(tmp_path / "bert"), "--quiet", "-o", str(tmp_path / "bert.onnx")]) == 0
    session = ort.InferenceSession(str(tmp_path / "bert.onnx"))
    inputs = [value.name for value in session.get_inputs()]
    texts = ["4 5 6 7 8", "9 10", "11"]
    own, file = (
        embed(Embedder(hidden, inputs, Words()), texts) for hidden in (torch_hidden(model), onnx_hidden(session))
    )
    np.testing.assert_allclose(own, file, atol=1e-5)
    ids = torch.tensor([[9, 10]])
    alone = model(input_ids=ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(own[1], (alone / alone.norm()).numpy(), atol=1e-5)


def test_logits_are_no_embedding():
    class Session:
        def get_inputs(self):
            return [SimpleNamespace(name="input_ids")]

        def get_outputs(self):
            return [SimpleNamespace(name="logits", shape=["b", "s", 9]), SimpleNamespace(name="pooled", shape=["b", 4])]

    with pytest.raises(InputError, match="has no output"):
        onnx_hidden(Session())
    Session.get_inputs = lambda self: [SimpleNamespace(name="pixel_values")]
    with pytest.raises(InputError, match="takes pixel_values"):
        onnx_hidden(Session())
    with pytest.raises(InputError, match="BertForMaskedLM gives no last hidden state"):
        torch_hidden(random_model("bert"))({"input_ids": np.array([[4, 5]])})
