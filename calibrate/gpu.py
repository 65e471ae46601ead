"""Where tensors on an NVIDIA GPU find the kernels: the module ``_cuda``, which only builds with CUDA have."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor


@contextmanager
def kernels(tensor: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """The kernels and the current stream of ``tensor``'s GPU, which is the current device while the block runs.

    Raises:
        ImportError: this installation was built without GPU kernels.
    """
    try:
        from .. import _cuda
    except ImportError:
        raise ImportError(
            f"a tensor on {tensor.device} needs the GPU kernels, and this installation was built without them; "
            "pip install . -Ccmake.define.SPARSIFY_CUDA=ON builds them"
        ) from None
    with torch.cuda.device(tensor.device):
        yield _cuda, torch.cuda.current_stream().cuda_stream
