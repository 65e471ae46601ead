"""Open what was written, an ONNX file or a TensorRT engine, through one interface."""

from pathlib import Path
from typing import Any

from .session import CausalSession, model_file, open_session
from .tensorrt.session import CausalPlan, PlanSession, is_plan


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
