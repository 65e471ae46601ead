"""Runs the command on a pretrained model, to a refusal."""

import re
from pathlib import Path

from sparsify_export.cli import main

SHORT = ["--samples", "4", "--seq-len", "32", "--quiet"]


def names(folder: Path) -> set[str]:
    """The names of what is in a folder, without the hash in those of data files."""
    return {re.sub(r"\.[0-9a-f]{12}\.data$", ".data", file.name) for file in folder.iterdir()}


def refused(capsys, out: Path, *arguments: object) -> str:
    """Run, expect exit code 2 with one sentence and nothing left behind; returns the sentence."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    capsys.readouterr()  # what making the model said
    assert main([*map(str, arguments), "-o", str(out)]) == 2
    *notes, said = capsys.readouterr().err.strip().splitlines()  # what was shortened, and sizes, may be said before
    assert said.startswith("sparsify-export: "), said
    assert all(note.startswith(("windows shortened", "the file takes")) or not note.strip() for note in notes), notes
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return said
