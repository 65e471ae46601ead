"""The kernels under test: emulated, compiled once; for the tests of kernels also those of a GPU, where there is one."""

from pathlib import Path

import cuda_bindings
import cuda_emulated
import cuda_gpu
import pytest

ON_BOTH = {"test_gather_channels", "test_rate_mask", "test_spmm_24", "test_spmm_24_int4", "test_spmm_bitmask"}


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames and Path(metafunc.module.__file__).stem in ON_BOTH:
        both = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
        metafunc.parametrize("kernels", both, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernels(request):
    return cuda_gpu.find() if getattr(request, "param", None) == "gpu" else cuda_emulated.build()


@pytest.fixture(scope="session")
def cuda():
    """The module `_cuda`, with the emulated kernels."""
    return cuda_bindings.build(cuda_emulated.build())
