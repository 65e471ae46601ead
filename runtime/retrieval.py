"""How well an embedding model finds passages: nDCG and recall over a collection in BEIR's layout."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes.errors import InputError
from ..passes.files import check_regular
from ..passes.frontend.batches import LARGEST_TEXT
from .embedding import Embedder, embed

DEPTH = 10
"""Passages of a ranking that count."""
ROWS = 256  # queries that are compared with all passages at once


@dataclass(frozen=True)
class Collection:
    """Passages, queries, and which passages answer which query.

    Attributes:
        passages: text by id.
        queries: text by id, of those only that have an answer.
        judgements: by query, how much each answering passage is worth, above zero.
    """

    passages: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Retrieval:
    """How well passages were found, means over queries, between 0 and 1.

    Attributes:
        ndcg: normalised discounted cumulative gain of the first ``depth`` passages.
        recall: fraction of the answering passages that are among them.
        depth: passages of a ranking that counted.
        queries: how many queries were asked.
        passages: how many passages they were asked of.
    """

    ndcg: float
    recall: float
    depth: int
    queries: int
    passages: int

    def __str__(self) -> str:
        of = f"{self.queries} queries and {self.passages} passages"
        return f"nDCG@{self.depth} {self.ndcg:.4f}, recall@{self.depth} {self.recall:.4f} over {of}"


def read_collection(folder: Path) -> Collection:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.

    Lines of the first two hold ``_id`` and ``text`` (and ``title``, which is put in front of a passage); lines of the
    third, behind a heading, query, passage and a whole number, separated by tabs (Thakur et al. 2021, "BEIR").

    Raises:
        InputError: a file is missing or damaged, an id stands twice or is not known, or no query has an answer.
    """
    passages = _texts(folder / "corpus.jsonl")
    queries = _texts(folder / "queries.jsonl")
    judgements: dict[str, dict[str, int]] = {}
    file = folder / "qrels" / "test.tsv"
    for number, line in enumerate(_lines(file), 1):
        fields = line.split("\t")
        if number == 1 and not fields[-1].strip().lstrip("-").isdigit():
            continue  # the heading
        if len(fields) != 3 or not fields[2].strip().lstrip("-").isdigit():
            raise InputError(f"{file}, line {number}: want query, passage and a whole number between tabs")
        query, passage, worth = fields[0], fields[1], int(fields[2])
        if query not in queries or passage not in passages:
            unknown = f"query {query!r}" if query not in queries else f"passage {passage!r}"
            raise InputError(f"{file}, line {number}: {unknown} is not in {folder}")
        if worth > 0:
            judgements.setdefault(query, {})[passage] = worth
    if not judgements:
        raise InputError(f"{file} judges no passage to answer a query; there is nothing to evaluate")
    return Collection(passages, {query: queries[query] for query in judgements}, judgements)


def retrieve(
    embedder: Embedder,
    collection: Collection,
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Retrieval:
    r"""Rank all passages for every query by the inner product of embeddings, and judge the first ten.

    .. math:: \text{nDCG@}k = \frac{\sum_{i=1}^{k} g_i / \log_2(i + 1)}{\max \sum_{i=1}^{k} g_i / \log_2(i + 1)}

    with :math:`g_i` what the passage at rank i is worth (Jarvelin and Kekalainen 2002, linear gains as trec_eval has
    them). A passage with a query's own id is not ranked for it, as BEIR leaves it out. Equal scores keep the order of
    the file.

    Raises:
        InputError: see ``embed``.
    """
    names = list(collection.passages)
    passages = embed(embedder, list(collection.passages.values()), prefix=embedder.pooling.passage, progress=progress)
    queries = embed(embedder, list(collection.queries.values()), prefix=embedder.pooling.query, progress=progress)
    places = {name: index for index, name in enumerate(names)}
    gains, recalls = [], []
    for begin in range(0, len(queries), ROWS):
        scores = queries[begin : begin + ROWS] @ passages.T
        for query, row in zip(list(collection.queries)[begin : begin + ROWS], scores, strict=True):
            if query in places:
                row[places[query]] = -np.inf
            ranked = [names[index] for index in np.argsort(-row, kind="stable")[:DEPTH]]
            answers = {name: worth for name, worth in collection.judgements[query].items() if name != query}
            if answers:
                gains.append(ndcg([answers.get(name, 0) for name in ranked], list(answers.values())))
                recalls.append(sum(name in answers for name in ranked) / len(answers))
    if not gains:
        raise InputError("no query has an answer but itself; there is nothing to evaluate")
    return Retrieval(float(np.mean(gains)), float(np.mean(recalls)), DEPTH, len(gains), len(names))


def ndcg(ranked: list[int], worth: list[int]) -> float:
    """NDCG of a ranking, given what each of its passages is worth, in order, and what all answers are worth."""
    best = sorted(worth, reverse=True)[: len(ranked)]
    return float(_discounted(ranked) / _discounted(best))


def _discounted(worth: list[int]) -> float:
    discounts: NDArray[np.float64] = np.log2(np.arange(len(worth)) + 2)
    return float((np.array(worth) / discounts).sum())


def _texts(file: Path) -> dict[str, str]:
    """Text by id, the title in front of it."""
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(file), 1):
        try:
            entry: Any = json.loads(line)
            name, text = entry["_id"], f"{entry.get('title') or ''} {entry['text']}".strip()
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}, line {number}: want JSON with _id and text, got {error!r}") from error
        if not isinstance(name, str) or name in found:
            raise InputError(f"{file}, line {number}: want a string of its own as _id, got {name!r}")
        found[name] = text
    if not found:
        raise InputError(f"{file} is empty")
    return found


def _lines(file: Path) -> Iterator[str]:
    """Lines that hold something."""
    check_regular(file, most=LARGEST_TEXT)
    try:
        with file.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
