"""A repository of Triton: its configuration read by Triton's own protobuf, and compared with the file."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient
from commands import refused
from google.protobuf import text_format
from onnx import TensorProto, helper
from sparsify_export.passes.errors import InputError
from sparsify_export.triton_repository import check_triton, write_triton

OURS = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def parse():
    """Reads a configuration by the protobuf in tritonclient, whose package itself wants grpc."""
    file = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda folder: text_format.Parse((folder / "config.pbtxt").read_text(), module.ModelConfig())


def test_the_configuration_says_what_the_file_is(written, parse):
    model = written[1].parent / "repository" / "out"
    config = parse(model)
    assert (config.name, config.backend, config.max_batch_size) == ("out", "onnxruntime", 0)
    (library,) = config.model_operations.op_library_filename
    assert Path(library).is_absolute()
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(str(model / "1" / config.default_model_filename), options)
    for stated, given in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        types = stated[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        assert [(t.name, types[t.data_type].name, list(t.dims)) for t in stated] == [
            (g.name, OURS[g.type], [size if isinstance(size, int) else -1 for size in g.shape]) for g in given
        ]
    ids = np.ones((1, 3), np.int64)
    past = {t.name: np.zeros((1, 4, 0, 16), np.float32) for t in config.input if t.name.startswith("past")}
    assert session.run(["logits"], {"input_ids": ids, "attention_mask": ids, **past})[0].shape == (1, 3, 96)
    assert {file.name for file in model.iterdir()} == {"1", "config.pbtxt", "README.md"}
    assert f"tritonserver --model-repository={model.parent}" in (model / "README.md").read_text()


def engine(folder, *, kind=TensorProto.FLOAT16, domain=""):
    """The ONNX file beside an engine that was not built."""
    values = [helper.make_tensor_value_info(name, kind, ["batch", 3, 8]) for name in "xy"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("sparsify", 1)]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], domain=domain)], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(folder / "m.trt.onnx"))
    return folder / "m.plan"


def test_an_engine_is_configured_before_it_is_built(tmp_path, parse):
    out = engine(tmp_path, domain="sparsify")
    write_triton(out, check_triton(tmp_path / "repository", out))
    model = tmp_path / "repository" / "m"
    config = parse(model)
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "m.plan")
    assert [(t.name, list(t.dims)) for t in (*config.input, *config.output)] == [("x", [-1, 3, 8]), ("y", [-1, 3, 8])]
    assert not config.model_operations.op_library_filename
    assert list((model / "1").iterdir()) == []
    said = (model / "README.md").read_text()
    assert f"--backend-config=tensorrt,plugins={model}/1/libsparsify_tensorrt.so" in said
    assert "past_key_values" not in said


def test_refusals(tmp_path, images, capsys):
    out = engine(tmp_path, kind=TensorProto.COMPLEX64)
    with pytest.raises(InputError, match="Triton cannot take x, a COMPLEX64 of 3 axes"):
        write_triton(out, check_triton(tmp_path / "r", out))
    assert list((tmp_path / "r").iterdir()) == []
    (tmp_path / "r" / "o").mkdir()
    (tmp_path / "a file").touch()
    assert "r/o exists already" in refused(capsys, tmp_path / "o", images, "--triton", tmp_path / "r")
    assert "lies in" in refused(capsys, tmp_path / "o", images, "--triton", tmp_path / "o")
    assert "is a file" in refused(capsys, tmp_path / "o", images, "--triton", tmp_path / "a file")
    assert "cannot hold a model called" in refused(capsys, tmp_path / "ä.onnx", images, "--triton", tmp_path / "r")
