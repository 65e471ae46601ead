"""The bindings of both versions, as the tests see them."""

import pytest
from trt_surface import VERSIONS, WHEELS, read_surface


@pytest.fixture(scope="session", params=VERSIONS)
def surface(request, tmp_path_factory):
    if not (WHEELS / request.param / "tensorrt_bindings").is_dir():
        pytest.skip(f"the bindings of TensorRT {request.param} are not in {WHEELS}; `make test` puts them there")
    return read_surface(request.param, tmp_path_factory.mktemp("stub"))
