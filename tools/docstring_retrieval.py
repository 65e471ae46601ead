"""A retrieval collection that every machine has: the docstrings of Python's standard library, in BEIR's layout.

    python -P tools/docstring_retrieval.py --out FOLDER

A query is the first paragraph of a docstring, the passage that answers it is the rest. Modules are split in two by
their names: one half gives FOLDER/corpus.jsonl, queries.jsonl and qrels/test.tsv, the other FOLDER/calibration.txt, so
that nothing is evaluated that was calibrated on. What comes out depends on the version of Python alone: figures of two
versions do not compare.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
SHORTEST_QUERY, LONGEST_QUERY, SHORTEST_PASSAGE = 20, 200, 120

app = App()


@app.default
def main(*, out: Path) -> None:
    """Write the collection.

    Args:
        out: the folder.
    """
    halves: tuple[dict[str, str], dict[str, str]] = ({}, {})  # query by passage: some stand in several modules
    for module, query, passage in pairs(Path(sysconfig.get_path("stdlib"))):
        half = halves[hashlib.sha256(module.encode()).digest()[0] % 2]
        if query not in half.values():
            half.setdefault(passage, query)
    evaluated, other = halves
    calibrated = [f"{query}\n\n{passage}" for passage, query in other.items() if passage not in evaluated]
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    items = list(enumerate(evaluated.items()))
    _write(out / "corpus.jsonl", [json.dumps({"_id": f"p{i}", "text": passage}) for i, (passage, _) in items])
    _write(out / "queries.jsonl", [json.dumps({"_id": f"q{i}", "text": query}) for i, (_, query) in items])
    _write(out / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{i}\t1" for i, _ in items)])
    _write(out / "calibration.txt", ["\n\n".join(calibrated)])
    sys.stdout.write(f"{len(items)} queries and passages, {len(calibrated)} docstrings to calibrate on: {out}\n")


def pairs(root: Path) -> Iterator[tuple[str, str, str]]:
    """Module, first paragraph and the rest of every docstring that has both, in the order of the files' names."""
    for file in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # what is odd about its strings is not our affair
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first, _, rest = re.sub(r"\n\s*\n", "\0", ast.get_docstring(node) or "", count=1).partition("\0")
                query, passage = " ".join(first.split()), " ".join(rest.split())
                if SHORTEST_QUERY <= len(query) <= LONGEST_QUERY and len(passage) >= SHORTEST_PASSAGE:
                    yield file.relative_to(root).as_posix(), query, passage


def _write(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    app()
