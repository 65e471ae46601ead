"""How far the sentence embeddings of a pruned encoder are from those of the dense one.

    python -P tools/embedding_similarity.py DENSE.onnx SPARSE.onnx [--tokenizer MODEL] [--json]

Both files are run on the same sentences. An embedding is the mean of the last hidden states over a sentence's tokens.
Printed are the cosine similarity of each sentence's two embeddings, and the rank correlation between the dense and the
sparse model of the similarities of all pairs of sentences: what search and clustering are made of.
"""

import itertools
import json as js
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from scipy.stats import spearmanr
from sparsify_export.frontdoor import tokenizer_of
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.session import model_file, open_session

SENTENCES = (
    "The ferry to the island leaves at seven in the morning.",
    "Early tomorrow a boat will take us across to the island.",
    "She planted tomatoes and beans behind the house.",
    "The vegetable garden needs water twice a day in summer.",
    "The engine would not start because the battery was empty.",
    "My car broke down on the way to work.",
    "A judge ruled that the contract was not valid.",
    "The court decided against the company.",
    "Add two eggs and a cup of flour, then stir slowly.",
    "This recipe makes enough pancakes for four people.",
    "The telescope found a planet that circles a small red star.",
    "Astronomers study light that left its source long ago.",
    "He practises the violin for two hours every evening.",
    "The orchestra played the second movement too fast.",
    "Interest rates were raised for the third time this year.",
    "The bank expects prices to rise more slowly.",
    "Our team lost the match in the last minute.",
    "The goalkeeper was injured before half time.",
    "Sort the list first, and then search it by halves.",
    "The program stops with an error when the file is empty.",
    "Heavy rain is expected in the north, with strong wind.",
    "It snowed all night and the roads are closed.",
    "The doctor told him to rest and to drink more water.",
    "A new vaccine protects children against the disease.",
    "The museum shows paintings from the seventeenth century.",
    "An old map was found between the pages of a book.",
    "Wolves have returned to the forests of the valley.",
    "The dog sleeps under the kitchen table.",
    "They moved to the city because there was no work at home.",
    "The train was so full that we had to stand.",
    "Why do people yawn when others do?",
    "No.",
)

app = App()


@app.default
def main(dense: Path, sparse: Path, *, tokenizer: str | None = None, json: bool = False) -> None:
    """Compare two exported files.

    Args:
        dense: the exported dense model.
        sparse: the exported sparse model.
        tokenizer: model whose tokenizer to use, where there is none beside ``dense``.
        json: print JSON.
    """
    words = tokenizer_of(dense, tokenizer)
    found = compare(embed(dense, words), embed(sparse, words))
    if json:
        print(js.dumps(found))
        return
    print(f"{sparse} against {dense}, {len(SENTENCES)} sentences:")
    print(f"cosine similarity: mean {found['mean']:.4f}, median {found['median']:.4f}, lowest {found['lowest']:.4f}")
    print(f"rank correlation of {found['pairs']} pairwise similarities: {found['rank_correlation']:.4f}")


def embed(file: Path, tokenizer: Any) -> np.ndarray:
    """Embeddings of length 1, float64 ``[sentences, hidden]``."""
    session = open_session(file)
    wanted = {value.name for value in session.get_inputs()}
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="np")
    if not wanted <= set(batch):
        raise InputError(f"{model_file(file)} takes {', '.join(sorted(wanted))}; want an encoder of text")
    feed = {name: batch[name].astype(np.int64) for name in wanted}
    (hidden,) = session.run(["last_hidden_state"], feed)
    mask = batch["attention_mask"][..., None].astype(np.float64)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def compare(dense: np.ndarray, sparse: np.ndarray) -> dict[str, float]:
    """Cosine similarity of the same sentences, and how alike both rank the pairs of different ones."""
    cosines = (dense * sparse).sum(1).tolist()
    pairs = list(itertools.combinations(range(len(dense)), 2))
    ranked = [[float(x[i] @ x[j]) for i, j in pairs] for x in (dense, sparse)]
    return {
        "mean": statistics.mean(cosines),
        "median": statistics.median(cosines),
        "lowest": min(cosines),
        "pairs": len(pairs),
        "rank_correlation": float(spearmanr(*ranked).statistic),
    }


if __name__ == "__main__":
    app()
