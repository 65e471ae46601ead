"""Run what was compiled: CPU kernels, ONNX Runtime sessions, evaluation and benchmarks."""

from pathlib import Path

from .. import _native

__all__ = ["library_path"]


def library_path() -> Path:
    """The file for ``SessionOptions.register_custom_ops_library``; it is installed beside the compiled module.

    Raises:
        FileNotFoundError: this installation has no such file.
    """
    file = Path(_native.__file__).with_name("libsparsify_ort.so")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; reinstall sparsify-export, which builds it")
    return file
