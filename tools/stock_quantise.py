"""What ONNX Runtime's own quantisers make of a dense export: the dense model to compare a sparse one with.

    sparsify-export MODEL -o DENSE/
    python -P tools/stock_quantise.py DENSE/ INT8/
    python -P tools/stock_quantise.py DENSE/ INT4/ --bits 4

With 8 bits, weights of products and embeddings become int8, a scale for each column of a product, and activations are
quantised when the model runs. With 4 bits, weights of products become MatMulNBits in blocks of 32. What lies beside the
model (tokenizer, configuration) is copied, so that `eval` and `bench` take the folder.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from cyclopts import App
from sparsify_export.runtime.stock import stock_int4, stock_int8

app = App()


@app.default
def main(dense: Path, out: Path, /, *, bits: Literal[4, 8] = 8) -> None:
    """Quantise a dense folder.

    Args:
        dense: a folder that ``sparsify-export MODEL -o DENSE/`` wrote.
        out: the folder to write; it must not exist.
        bits: of a weight.
    """
    if not (dense / "model.onnx").is_file() or out.exists():
        sys.exit(f"want a folder of a dense export, got {dense}, and one that does not exist, got {out}")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / "made"
        shutil.copytree(dense, made, ignore=shutil.ignore_patterns("model.onnx*", "report.json"))
        quantise = stock_int8 if bits == 8 else stock_int4
        quantise(dense / "model.onnx", made / "model.onnx")
        made.rename(out)


if __name__ == "__main__":
    app()
