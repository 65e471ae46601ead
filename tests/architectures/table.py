"""Print the outcome of every entry: ``PYTHONPATH=tests python -m architectures.table [NAME ...]``."""

import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from .listed import ENTRIES
from .outcomes import outcome


def table(names: Sequence[str]) -> None:
    """Run the entries whose model is named, or all, and print a line for each."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found: Counter[str] = Counter()
    for entry in ENTRIES:
        if names and entry.model not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                got = outcome(entry, Path(folder))
            except Exception:
                print(f"unmade    {entry.name}: {traceback.format_exc(limit=-2)}", flush=True)
                found["unmade"] += 1
                continue
        found[got.result] += 1
        share = f" {got.share:.0%}" if got.result == "compiled" else ""
        print(f"{got.result:9} {entry.name}{share} ({got.seconds:.1f} s) {got.said}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in found.most_common()))


if __name__ == "__main__":
    table(sys.argv[1:])
