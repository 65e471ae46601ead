"""What ONNX Runtime's own quantiser makes of a dense export: the dense int8 model to compare a sparse one with.

    sparsify-export MODEL -o DENSE/
    python -P tools/stock_int8.py DENSE/ INT8/

Weights of products and embeddings become int8, a scale for each column of a product; activations are quantised when the
model runs. What lies beside the model (tokenizer, configuration) is copied, so that `eval` and `bench` take the folder.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from cyclopts import App
from onnxruntime.quantization import QuantType, quantize_dynamic

QUANTISED = ["MatMul", "Gemm", "Gather"]
"""Left to itself the quantiser takes the standard op Attention for an older one of that name, and breaks the file."""

app = App()


@app.default
def main(dense: Path, out: Path, /) -> None:
    """Quantise a dense folder.

    Args:
        dense: a folder that ``sparsify-export MODEL -o DENSE/`` wrote.
        out: the folder to write; it must not exist.
    """
    if not (dense / "model.onnx").is_file() or out.exists():
        sys.exit(f"want a folder of a dense export, got {dense}, and one that does not exist, got {out}")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / "made"
        shutil.copytree(dense, made, ignore=shutil.ignore_patterns("model.onnx*", "report.json"))
        # A scale a column, as its own dynamic products have it.
        quantize_dynamic(
            dense / "model.onnx",
            made / "model.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=QUANTISED,
        )
        made.rename(out)


if __name__ == "__main__":
    app()
