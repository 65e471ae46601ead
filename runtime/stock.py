"""What ONNX Runtime's own quantisers make of a dense file: the models that a sparse one has to beat."""

from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # type: ignore[import-untyped]

QUANTISED = ["MatMul", "Gemm", "Gather"]
"""Left to itself the quantiser takes the standard op Attention for an older one of that name, and breaks the file."""
BLOCK = 32
"""Columns that share a scale of 4-bit codes."""


def stock_int8(dense: Path, out: Path) -> None:
    """Weights of products and embeddings as int8, a scale for each column of a product; activations when it runs."""
    quantize_dynamic(
        dense,
        out,
        weight_type=QuantType.QInt8,
        per_channel=True,  # as its own dynamic products have it
        op_types_to_quantize=QUANTISED,
    )


def stock_int4(dense: Path, out: Path) -> None:
    """Weights of products as ``MatMulNBits`` in blocks of 32; activations in 8 bits, the quickest that it has."""
    quantiser = MatMulNBitsQuantizer(onnx.load(dense), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantiser.process()
    quantiser.model.save_model_to_file(str(out), use_external_data_format=True)
