"""The emulated kernels, compiled once."""

import cuda_emulated
import pytest


@pytest.fixture(scope="session")
def kernels():
    return cuda_emulated.build()
