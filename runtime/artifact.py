"""Open what was written, an ONNX file or a TensorRT engine, through one interface."""

import json
from pathlib import Path
from typing import Any

import onnx

from .session import CausalSession, model_file, open_session
from .tensorrt.session import CausalPlan, PlanSession, is_plan

CONTEXT = "context"
"""What the metadata of our files call the tokens of a text that the model takes at most (``positions.longest``)."""


def open_artifact(path: Path, *, threads: int | None = None, kernels: bool = True) -> Any:
    """An ONNX Runtime session, or an engine that looks like one; see ``open_session``.

    Raises:
        InputError: the file cannot be opened.
        NotBuiltError: it is an engine, and engines cannot be run here.
    """
    return PlanSession(path) if is_plan(path) else open_session(path, threads=threads, kernels=kernels)


def causal(session: Any) -> CausalSession:
    """The causal language model in what ``open_artifact`` returned.

    Raises:
        InputError: it is none.
    """
    return CausalPlan(session) if isinstance(session, PlanSession) else CausalSession(session)


def artifact_file(path: Path) -> Path:
    """The file that a path means: an engine, an ONNX file, or ``model.onnx`` in a folder.

    Raises:
        InputError: it does not exist, or is neither.
    """
    return path if is_plan(path) and path.is_file() else model_file(path)


def onnx_of(path: Path) -> Path:
    """The ONNX file that a path means: of an engine the one that it was built from, which lies beside it.

    Raises:
        InputError: it does not exist, or is no ONNX file.
    """
    return model_file(path.with_suffix(".trt.onnx") if is_plan(path) else path)


def context_of(path: Path) -> int | None:
    """Tokens of a text at most, as the file says, which knew the model; None where it says nothing.

    Raises:
        InputError: see ``onnx_of``.
    """
    model = onnx.load(str(onnx_of(path)), load_external_data=False)
    found = [entry.value for entry in model.metadata_props if entry.key == f"sparsify.{CONTEXT}"]
    try:
        limit = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    return limit if type(limit) is int and limit > 0 else None
