"""What several tests of the command begin with."""

import pytest
from onnx_models import dense, mlp, saved


@pytest.fixture
def given(tmp_path):
    return saved(mlp(dense(64, 64, 1), dense(64, 32, 2)), tmp_path, "given.onnx")
