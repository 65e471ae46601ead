"""Why a model cannot be traced, in a sentence: what its code does, and where, rather than what torch.export says."""

import linecache
import re
import traceback
from pathlib import Path

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

LIBRARY = str(Path(torch.__file__).parent)


def why_not(model: str, error: Exception) -> str:
    """The rest of a sentence that begins with the model's source.

    Args:
        model: the name of the model's class.
        error: what torch.export or the model's own code raised; of any kind.
    """
    if fixed := _made_constant(str(error)):
        what = f"the code of {model} makes a constant of the {fixed}"
        return f"cannot be compiled: {what}, so a file would hold for one only"
    if isinstance(error, GuardOnDataDependentSymNode) or "GuardOnDataDependentSymNode" in str(error):
        return (
            f"cannot be compiled: the code of {model} chooses its way by numbers that it computes{_place(error)}, "
            "and a graph has one way only"
        )
    return f"cannot be traced: {sentence(error)}"


def sentence(error: Exception) -> str:
    """The first line of an error that is no listing of a graph, which torch puts in front of some, or its place."""
    lines = [line.strip() for line in str(error).splitlines()]
    code = re.compile(r"def forward|[\w, ]+(:.*)? = |return |#|\W*$")
    said = next((line for line in lines if line and not code.match(line)), "")
    return f"{type(error).__name__}: {said}" if said else f"{type(error).__name__}{_place(error)}"


def _made_constant(said: str) -> str:
    """Which size of the inputs torch.export had to fix, in words; "" where it complains of something else."""
    if "Constraints violated" not in said:
        return ""
    named = re.search(r"Constraints violated \(([\w, ]+)\)", said)
    axes = set(re.findall(r"size\(\)\[(\d)\]", said)) | ({"0"} if named and "batch" in named[1] else set())
    return " and the ".join(name for axis, name in (("0", "batch"), ("1", "length")) if axis in axes)


def _place(error: BaseException) -> str:
    """The innermost line of code that is not torch's own, in brackets; "" where there is none."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith((LIBRARY, "<")) and Path(file).is_file() and "sparsify_export" not in file:
            found = file, line
    if found is None:
        return ""
    return f" ({linecache.getline(*found).strip()!r}, {Path(found[0]).name} line {found[1]})"
