"""Texts that an encoder reads one by one: where they begin and end, and padding in batches."""

import json
from types import SimpleNamespace

import pytest
import torch
from encoders import tokenizer
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Texts, padded_batches, read_texts

CLS, SEP, FIRST = 1, 2, 4  # the numbers of <cls>, <sep> and w0
NAMES = ("input_ids", "attention_mask", "token_type_ids")


def read(folder, content, name="text.txt", *, tokens=1000, length=8, bos=True):
    (folder / name).write_text(content)
    return read_texts(folder / name, tokenizer(), tokens=tokens, length=length, bos=bos)


def test_a_blank_line_ends_a_text_and_special_tokens_are_around_each(tmp_path):
    found = read(tmp_path, "\n\n w0 w1\nw2\n \n\nw3\n")
    assert found.ids == ((CLS, 4, 5, 6, SEP), (CLS, 7, SEP))
    assert found.types == ((0,) * 5, (0,) * 3)
    assert found.tokens == 8
    assert read(tmp_path, "w0\n\nw1", bos=False).ids == ((4,), (5,))


def test_a_long_text_becomes_several(tmp_path):
    found = read(tmp_path, " ".join(f"w{i}" for i in range(8)) + "\n\nw9", length=5)
    assert found.ids == ((CLS, 4, 5, 6, SEP), (CLS, 7, 8, 9, SEP), (CLS, 10, 11, SEP), (CLS, 13, SEP))


def test_lines_of_jsonl_are_texts_or_pairs(tmp_path):
    lines = [{"text": "w0\n\nw1"}, {"text": "w2", "text_pair": "w3"}, {"text": ""}]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)), "text.jsonl")
    assert found.ids == ((CLS, 4, 5, SEP), (CLS, 6, SEP, 7, SEP))
    assert found.types == ((0, 0, 0, 0), (0, 0, 0, 1, 1))
    cut = read(tmp_path, json.dumps({"text": "w1 w2", "text_pair": "w3 w4 w5"}), "text.jsonl", length=6)
    assert [len(ids) for ids in cut.ids] == [6]


def test_reading_ends_where_there_are_tokens_enough(tmp_path):
    content = "\n\n".join(["w1 w2"] * 500)
    assert len(read(tmp_path, content, tokens=9)) == 3
    assert len(read(tmp_path, content, tokens=10**6)) == 500


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("text.txt", " \n ", "is empty; want text"),
        ("text.jsonl", '{"text": 3}', "is not JSONL with a text field"),
        ("text.jsonl", '{"text": "w1", "text_pair": 3}', "a text_pair is 3; want a string"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, why):
    with pytest.raises(InputError, match=why):
        read(tmp_path, content, name)


def test_batches_hold_texts_of_like_length_padded_behind():
    texts = Texts(((1, 5, 6, 2), (1, 2), (1, 9, 2), (1, 7, 2)), ((0, 0, 1, 1), (0, 0), (0, 0, 0), (0, 1, 1)))
    batches = padded_batches(SimpleNamespace(cache=()), texts, names=NAMES, padding=0, tokens_per_batch=6)
    order = sorted(batches, key=lambda batch: batch.inputs[0].shape[1])
    ids, masks, types = zip(*(batch.inputs for batch in order), strict=True)
    assert [x.tolist() for x in ids] == [[[1, 2, 0], [1, 9, 2]], [[1, 7, 2]], [[1, 5, 6, 2]]]
    assert [x.tolist() for x in masks] == [[[1, 1, 0], [1, 1, 1]], [[1, 1, 1]], [[1, 1, 1, 1]]]
    assert [x.tolist() for x in types] == [[[0, 0, 0], [0, 0, 0]], [[0, 1, 1]], [[0, 0, 1, 1]]]
    assert all(torch.equal(batch.token_mask, batch.inputs[1].bool()) for batch in batches)
    (whole,) = padded_batches(SimpleNamespace(cache=()), texts, names=NAMES[:2], padding=3)
    assert whole.inputs[0].tolist() == [[1, 2, 3, 3], [1, 9, 2, 3], [1, 7, 2, 3], [1, 5, 6, 2]]
    assert len(whole.inputs) == 2


def test_the_batches_that_are_held_out_are_of_any_length():
    texts = Texts(tuple((1,) * n for n in range(2, 102)), tuple((0,) * n for n in range(2, 102)))
    batches = padded_batches(SimpleNamespace(cache=()), texts, names=NAMES, padding=0, tokens_per_batch=102)
    lengths = [batch.inputs[0].shape[1] for batch in batches]
    assert sorted(lengths) != lengths
    assert max(lengths[7::8]) - min(lengths[7::8]) > 50
