"""A real encoder in fp32, all-MiniLM-L6-v2 from its wheel: 2:4 keeps the meaning of sentences. Run by `make slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sparsify_export.cli import main

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.append(str(TOOLS))  # behind the installed package

from embedding_similarity import SENTENCES, compare, embed  # noqa: E402
from sparsify_export.frontdoor import tokenizer_of  # noqa: E402

pytestmark = pytest.mark.slow


def test_embeddings_of_a_2_4_model_are_like_the_dense_ones(tmp_path):
    found = subprocess.run([sys.executable, TOOLS / "minilm.py"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    source = found.stdout.strip()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES[::2]))
    assert main([source, "--quiet", "-o", str(tmp_path / "dense")]) == 0
    flags = ["--nm", "2:4", "--calibration", str(text), "--samples", "8", "--seq-len", "16"]
    assert main([source, *flags, "--quiet", "-o", str(tmp_path / "sparse")]) == 0
    linears = json.loads((tmp_path / "sparse" / "report.json").read_text())["linears"]
    assert sum(entry["pattern"] == "2:4" for entry in linears) == 36
    words = tokenizer_of(tmp_path / "dense", None)
    dense, sparse = (embed(tmp_path / name, words) for name in ("dense", "sparse"))
    same = compare(dense, dense)
    assert same["lowest"] == pytest.approx(1)
    assert same["rank_correlation"] == pytest.approx(1)
    found = compare(dense, sparse)
    assert found["mean"] > 0.7
    assert found["rank_correlation"] > 0.6
