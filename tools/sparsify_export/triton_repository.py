"""A model of Triton Inference Server: ``--triton REPOSITORY`` puts what was compiled into a model repository."""

import os
import re
import secrets
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto

from .passes.errors import InputError
from .passes.onnx.plugin import LIBRARY
from .passes.onnx.protos import data_files
from .publish import PARTIAL
from .runtime import library_path
from .runtime.artifact import onnx_of
from .runtime.session import model_file
from .runtime.tensorrt.session import is_plan

TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.BOOL: "TYPE_BOOL",
}
"""What Triton calls the types of inputs and outputs."""
NAME = re.compile(r"[A-Za-z0-9._-]+")
VERSION = "1"
STATELESS = """
The cache of this decoder is an input and an output like any other: the first request holds one of no tokens, and what
`present.*` returns goes into the next as `past_key_values.*`, with an attention mask of ones as long as both together.
"""


def check_triton(repository: Path, out: Path) -> Path:
    """Where the model goes; called before any work is done.

    Raises:
        InputError: it is there already, or cannot be written.
    """
    name = out.stem if out.suffix in (".onnx", ".plan") else out.name
    flag = f"--triton {repository}"
    if not NAME.fullmatch(name):
        raise InputError(f"{flag} cannot hold a model called {name!r}; want letters, digits, '.', '_' and '-'")
    if not (repository if repository.exists() else repository.parent).is_dir():
        raise InputError(f"{flag} cannot be written: {repository.parent} is not a folder, or {repository} is a file")
    if out.resolve() in (repository.resolve(), *repository.resolve().parents):
        raise InputError(f"{flag} lies in {out}, which is written too; give another folder")
    if os.path.lexists(repository / name):
        raise InputError(f"{repository / name} exists already; remove it or give another repository")
    return repository / name


def write_triton(out: Path, model: Path) -> None:
    """Put a compiled model into a repository: ``config.pbtxt``, ``README.md`` and the files of version 1.

    An ONNX model gets our library, which Triton loads by the absolute path that stands in ``config.pbtxt``. Of an
    engine that was not built here everything is written but the engine.

    Args:
        out: an ONNX file, a folder that holds ``model.onnx``, or an engine.
        model: the folder that ``check_triton`` found.

    Raises:
        InputError: it cannot be written, or Triton has no name for a type of its inputs and outputs.
    """
    engine = is_plan(out)
    file = out if engine else model_file(out)
    graph = onnx.load(str(onnx_of(out)), load_external_data=False).graph
    # Where it will lie: Triton hands the path of a library to the loader as it is.
    version = model.resolve() / VERSION
    if engine:
        files = [path for path in (file, file.with_name(LIBRARY)) if path.is_file()]
    else:
        files = [file, *data_files(file), library_path()]
    stage = model.with_name(f".{model.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        (stage / VERSION).mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, stage / VERSION / path.name)
        (stage / "config.pbtxt").write_text(_config(model.name, file.name, graph, version, engine=engine))
        (stage / "README.md").write_text(_readme(model, file.name, graph, version, engine=engine))
        stage.rename(model)
    except OSError as error:
        raise InputError(f"{model} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _config(name: str, file: str, graph: onnx.GraphProto, version: Path, *, engine: bool) -> str:
    """The configuration; ``max_batch_size`` 0 says that shapes are whole, batch included."""
    lines = [f'name: "{name}"', f'default_model_filename: "{file}"', "max_batch_size: 0"]
    lines.append('platform: "tensorrt_plan"' if engine else 'backend: "onnxruntime"')
    if not engine:
        lines.append(f'model_operations {{ op_library_filename: ["{version / library_path().name}"] }}')
    for kind, values in (("input", _inputs(graph)), ("output", list(graph.output))):
        lines += [f"{kind} [", ",\n".join(_tensor(value) for value in values), "]"]
    return "\n".join(lines) + "\n"


def _tensor(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    if tensor.elem_type not in TYPES or not tensor.shape.dim:
        what = TensorProto.DataType.Name(tensor.elem_type)
        raise InputError(f"Triton cannot take {value.name}, a {what} of {len(tensor.shape.dim)} axes")
    sizes = ", ".join(str(_size(dim)) for dim in tensor.shape.dim)
    return f'  {{ name: "{value.name}" data_type: {TYPES[tensor.elem_type]} dims: [ {sizes} ] }}'


def _size(dim: onnx.TensorShapeProto.Dimension) -> int:
    return dim.dim_value if dim.HasField("dim_value") else -1


def _readme(model: Path, file: str, graph: onnx.GraphProto, version: Path, *, engine: bool) -> str:
    """How to start a server with the model and ask it; nothing here has been run in a server."""
    repository = model.resolve().parent
    needs = (
        f"The engine `{VERSION}/{file}` must have been built by the TensorRT version of the server."
        if engine
        else "The server's ONNX Runtime has to be 1.24.1 or newer. `config.pbtxt` names our library by its absolute "
        "path, so the repository is mounted under the path that it has here; mounted elsewhere, change that line."
    )
    plugins = f" --backend-config=tensorrt,plugins={version / LIBRARY}" if (engine and _plugged(graph)) else ""
    gpus = " --gpus all" if engine else ""
    cached = any(value.name.startswith("past_key_values.") for value in graph.input)
    return (
        f"# {model.name}\n\nWritten by sparsify-export. {needs}\n\n"
        f"    docker run --rm{gpus} -p 8000:8000 -v {repository}:{repository} nvcr.io/nvidia/tritonserver:TAG-py3 \\\n"
        f"        tritonserver --model-repository={repository}{plugins}\n\n"
        f"    curl localhost:8000/v2/models/{model.name}/config\n{STATELESS if cached else ''}"
    )


def _plugged(graph: onnx.GraphProto) -> bool:
    return any(node.domain not in ("", "ai.onnx") for node in graph.node)
