"""nDCG and recall by hand and against a loop from the definition, collections in BEIR's layout, and their refusals."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.embedding import Embedder, Pooling
from sparsify_export.runtime.retrieval import Collection, ndcg, read_collection, retrieve


def slow_ndcg(ranked, worth):
    """The definition, a term at a time."""
    gain = sum(g / math.log2(place + 1) for place, g in enumerate(ranked, 1))
    best = sum(g / math.log2(place + 1) for place, g in enumerate(sorted(worth)[::-1][: len(ranked)], 1))
    return gain / best


def test_ndcg_by_hand():
    assert ndcg([1, 0, 0], [1]) == 1
    assert ndcg([0, 1, 0], [1]) == pytest.approx(1 / math.log2(3))
    assert ndcg([0, 0, 0], [1]) == 0
    # 2 at the first place and 1 at the third, where 2, 1, 1 would be best.
    assert ndcg([2, 0, 1], [1, 2, 1]) == pytest.approx((2 + 1 / 2) / (2 + 1 / math.log2(3) + 1 / 2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_ndcg_is_its_definition(ranked, more):
    worth = [g for g in ranked if g] + more
    assert ndcg(ranked, worth) == pytest.approx(slow_ndcg(ranked, worth))
    assert 0 <= ndcg(ranked, worth) <= 1 + 1e-12


def embedder(vectors):
    """One token a text, which is the row of a table that is its embedding."""
    vectors = np.array(vectors, np.float32)
    tokenizer = SimpleNamespace(model_max_length=10**30, pad_token_id=0, padding_side="right")
    tokenizer = type("Words", (), {**vars(tokenizer), "__call__": lambda _, texts, **__: _ids(texts)})()
    return Embedder(lambda arrays: vectors[arrays["input_ids"]], ["input_ids"], tokenizer, Pooling(normalise=False))


def _ids(texts):
    return {"input_ids": [[int(text)] for text in texts]}


def test_passages_are_ranked_by_the_product_of_embeddings():
    vectors = [[1, 0], [0.9, 0], [0.5, 0], [0, 1]]  # passages 0 to 2 in this order for query 0; its answers are 1, 2
    found = retrieve(embedder(vectors), Collection({"a": "0", "b": "1", "c": "2"}, {"q": "0"}, {"q": {"b": 1, "c": 1}}))
    assert found.ndcg == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))
    assert (found.recall, found.queries, found.passages) == (1, 1, 3)


def test_a_passage_with_the_query_s_own_id_is_left_out():
    vectors = [[1, 0], [0.9, 0]]
    found = retrieve(embedder(vectors), Collection({"q": "0", "b": "1"}, {"q": "0"}, {"q": {"q": 1, "b": 1}}))
    assert (found.ndcg, found.recall) == (1, 1)
    with pytest.raises(InputError, match="no query has an answer but itself"):
        retrieve(embedder(vectors), Collection({"q": "0", "b": "1"}, {"q": "0"}, {"q": {"q": 1}}))


def test_ten_passages_count():
    vectors = [[20 - i] for i in range(12)] + [[1]]
    passages = {f"p{i}": str(i) for i in range(12)}
    for place, recall in ((9, 1), (10, 0)):
        found = retrieve(embedder(vectors), Collection(passages, {"q": "12"}, {"q": {f"p{place}": 1}}))
        assert found.recall == recall


def written(folder, corpus=None, queries=None, qrels=None):
    """A collection of two passages and a query, or with other lines."""
    (folder / "qrels").mkdir(exist_ok=True)
    corpus = corpus or ['{"_id": "p1", "title": "A", "text": "one"}', '{"_id": "p2", "text": "two"}']
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "queries.jsonl").write_text("\n".join(queries or ['{"_id": "q1", "text": "which"}']))
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels or ["query-id\tcorpus-id\tscore", "q1\tp2\t1"]))
    return folder


def test_a_collection_is_read(tmp_path):
    read = read_collection(written(tmp_path, qrels=["query-id\tcorpus-id\tscore", "q1\tp2\t2", "q1\tp1\t0"]))
    assert read == Collection({"p1": "A one", "p2": "two"}, {"q1": "which"}, {"q1": {"p2": 2}})
    assert read_collection(written(tmp_path, qrels=["q1\tp1\t1"])).judgements == {"q1": {"p1": 1}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"corpus": ["{"]}, "corpus.jsonl, line 1: want JSON with _id and text"),
        ({"corpus": ["[1]"]}, "corpus.jsonl, line 1: want JSON with _id and text"),
        ({"corpus": ['{"_id": "p", "text": "\\ud800"}']}, "corpus.jsonl, line 1: want JSON"),
        ({"corpus": ['{"_id": 1, "text": "x"}']}, "want a string of its own as _id, got 1"),
        ({"queries": ['{"_id": "q1", "text": "a"}'] * 2}, "line 2: want a string of its own as _id, got 'q1'"),
        ({"corpus": [" "]}, "corpus.jsonl is empty"),
        ({"qrels": ["q1\tp2"]}, "line 1: want query, passage and a whole number|judges no passage"),
        ({"qrels": ["h\th\tscore", "q1\tp2\tx"]}, "line 2: want query, passage and a whole number"),
        ({"qrels": ["q9\tp2\t1"]}, "query 'q9' is not in"),
        ({"qrels": ["q1\tp9\t1"]}, "passage 'p9' is not in"),
        ({"qrels": ["q1\tp1\t0"]}, "judges no passage"),
    ],
)
def test_damaged_collections_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_collection(written(tmp_path, **lines))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*corpus\.jsonl"):
        read_collection(tmp_path)


@pytest.mark.slow
def test_the_collection_of_docstrings(tmp_path):
    """Made from this machine's standard library: read by what evaluates it, and nothing calibrated on is in it."""
    file = Path(__file__).parents[2] / "tools" / "docstring_retrieval.py"
    spec = importlib.util.spec_from_file_location("docstring_retrieval", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(out=tmp_path)
    read = read_collection(tmp_path)
    assert len(read.queries) == len(read.passages) == len(set(read.passages.values())) > 300
    calibrated = (tmp_path / "calibration.txt").read_text()
    assert len(calibrated) > 100_000
    assert not [text for text in read.passages.values() if text in calibrated.split("\n\n")]
