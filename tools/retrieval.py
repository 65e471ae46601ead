"""What an encoder is for: does it still find the text that answers?

    python -P tools/retrieval.py text OUT.txt                       text to calibrate on
    python -P tools/retrieval.py search DENSE.onnx SPARSE.onnx      the same searches by both

The texts are docstrings of Python's own library, which every machine has: the query is the first sentence of one, and
the passages are what stands behind it, of all of them. Each module is either calibrated on or searched, never both.
Printed is the mean reciprocal rank (MRR) of the right passage, and how often it comes first or among the first ten.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from sparsify_export.frontdoor import tokenizer_of
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.session import model_file, open_session

MOST = 600
TOKENS = 128

app = App()


@app.command
def text(out: Path) -> None:
    """Write the docstrings that are not searched, a paragraph each.

    Args:
        out: the file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(f"{query} {passage}" for query, passage in documented(searched=False)), encoding="utf-8")


@app.command
def search(dense: Path, *others: Path, tokenizer: str | None = None) -> None:
    """Search with each file.

    Args:
        dense: the exported dense model.
        others: exported sparse models.
        tokenizer: model whose tokenizer to use, where there is none beside ``dense``.
    """
    pairs = list(documented(searched=True))[:MOST]
    words = tokenizer_of(dense, tokenizer)
    print(f"{len(pairs)} searches among {len(pairs)} passages; by chance the MRR is {_by_chance(len(pairs)):.3f}")
    for file in (dense, *others):
        queries, passages = (embed(file, words, list(side)) for side in zip(*pairs, strict=True))
        ranks = ranked(queries, passages)
        print(
            f"{file}: MRR {np.mean(1 / ranks):.3f}, first {np.mean(ranks == 1):.1%}, "
            f"among ten {np.mean(ranks <= 10):.1%}"
        )


def documented(*, searched: bool) -> Iterator[tuple[str, str]]:
    """First sentences and what follows, of the modules that are searched or of the others; nothing is imported."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if (sum(file.stem.encode()) % 2 == 0) != searched:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                said = " ".join((ast.get_docstring(node) or "").split())
                query, _, passage = said.partition(". ")
                if len(query.split()) >= 4 and len(passage.split()) >= 12:
                    yield query, passage


def embed(file: Path, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Means of the last hidden states over each text's tokens, of length 1, float64 ``[texts, hidden]``."""
    session = open_session(file)
    wanted = {value.name for value in session.get_inputs()}
    rows = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            texts[start : start + 16], padding=True, truncation=True, max_length=TOKENS, return_tensors="np"
        )
        if not wanted <= set(batch):
            raise InputError(f"{model_file(file)} takes {', '.join(sorted(wanted))}; want an encoder of text")
        (hidden,) = session.run(["last_hidden_state"], {name: batch[name].astype(np.int64) for name in wanted})
        mask = batch["attention_mask"][..., None].astype(np.float64)
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    mean = np.concatenate(rows)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def ranked(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """The rank of passage i for query i among all passages, the best being 1; equals count as found before it."""
    similar = queries @ passages.T
    return (similar >= np.diag(similar)[:, None]).sum(1)


def _by_chance(count: int) -> float:
    return float(np.mean(1 / np.arange(1, count + 1)))


if __name__ == "__main__":
    app()
