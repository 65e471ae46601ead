"""The compiled GPU kernels behind the interface of `cuda_emulated.Kernels`: the same tests, on an NVIDIA GPU."""

import ctypes
import importlib.util

import pytest
import torch
from cuda_emulated import GUARD, SUCCESS, Kernels, Output


def find():
    """The kernels of this installation, or a skip that says what is missing."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    spec = importlib.util.find_spec("sparsify_export._cuda")
    if spec is None:
        pytest.skip("needs an installation with GPU kernels: pip install . -Ccmake.define.SPARSIFY_CUDA=ON")
    return GpuKernels(ctypes.CDLL(spec.origin))


def mirror(tensor, device):
    """A copy on the GPU that begins as far behind a multiple of 64 bytes as the tensor does."""
    memory = torch.empty(tensor.nbytes + 64, dtype=torch.uint8, device=device)
    begin = (tensor.data_ptr() - memory.data_ptr()) % 64
    part = memory[begin : begin + tensor.nbytes]
    part.copy_(tensor.reshape(-1).view(torch.uint8))
    return part.view(tensor.dtype).view(tensor.shape)


class GpuKernels(Kernels):
    """Tensors are copied to the GPU, called upon, and copied back."""

    def __init__(self, library, device="cuda"):
        super().__init__(library)
        self.device = device

    def call(self, name, *arguments):
        """Call a function with copies of the tensors, and wait for it."""
        copies = [mirror(a, self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        status = super().call(name, *copies)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return status

    def run(self, name, *arguments):
        """Call twice: the same input must give the same bits."""
        outputs = [a for a in arguments if isinstance(a, Output)]
        results = []
        for _ in range(2):
            written = {id(output): mirror(torch.full_like(output.bytes, 0xA5), self.device) for output in outputs}
            status = super().call(name, *(self._argument(a, written) for a in arguments))
            assert status == SUCCESS, f"{name} returned {status}"
            for output in outputs:
                output.bytes.copy_(written[id(output)])  # waits
            results.append([output.checked().clone() for output in outputs])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), f"{name}: two runs differ"
        return results[0][0] if len(outputs) == 1 else results[0]

    def _argument(self, argument, written):
        if isinstance(argument, torch.Tensor):
            return mirror(argument, self.device)
        if isinstance(argument, Output):
            edge = GUARD * argument.all.element_size()
            inside = written[id(argument)][edge : edge + argument.tensor.nbytes]
            return inside.view(argument.all.dtype)
        return argument
