"""Fitting a weight to its inputs: what it has to know of the model around it, be that traced or an ONNX file."""

from collections.abc import Sequence
from typing import Protocol

from .parts import Parts
from .recipe import Note, Recipe


def thin(seen: Sequence[tuple[str, int | None, int]], where: str) -> str:
    """Say so where calibration shows too little of what linears read; "" where it is enough.

    Args:
        seen: of each linear path, directions that its inputs were seen in (None where not known) and in_features.
        where: what they are linears of, for the sentence.
    """
    known = [(path, directions, features) for path, directions, features in seen if directions is not None]
    poor = [each for each in known if 2 * each[1] < each[2]]
    if not poor:
        return ""
    path, directions, features = min(poor, key=lambda each: each[1] / each[2])
    return (
        f"calibration shows {directions} of the {features} directions that the inputs of {path} have, and less than "
        f"half for {len(poor)} of {len(known)} linears of {where}: weights are fitted to these alone; give more text, "
        "or text that repeats itself less"
    )


class Fitting(Protocol):
    """The linears that are fitted; `block.Block` is one for traced models, `onnx.fit.Fit` for ONNX files."""

    @property
    def recipe(self) -> Recipe:
        """How to prune."""

    @property
    def note(self) -> Note:
        """Told what the user should know."""

    def path(self, key: str) -> str:
        """What the user calls the linear of a weight; the first of those that share it."""

    def parts(self, key: str) -> Parts:
        """The linears that a weight is made of, such as q, k and v of a fused one."""
