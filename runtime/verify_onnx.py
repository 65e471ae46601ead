"""Prove that a sparse ONNX model computes what the dense one with the same weights computes, with and without kernels.

There is no float64 form of an arbitrary ONNX model, so the truth is the dense model in which the linears that were
lowered run in float64: what was not touched is the same float32 on all three sides, and what is compared is what was
changed. The budget is the error of the same linears as plain float32 ops in ONNX Runtime.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..passes.equivalence import FACTOR, Closeness, compare
from ..passes.errors import VerificationError
from .feeds import Feed
from .session import open_session
from .verify import Verified

Outputs: TypeAlias = dict[str, Any]
WRONG = Closeness(float("inf"), 0.0)


def verify_onnx(
    path: Path, baseline: Path, exact: Path, feed: Feed, *, ways: Sequence[tuple[str, bool]]
) -> list[Verified]:
    """Run the result and compare every output.

    Args:
        path: the result.
        baseline: the dense model with the weights of the result.
        exact: the same, its lowered linears in float64.
        feed: the inputs.
        ways: name, and whether our kernels run.

    Returns:
        The error and the budget of every way, relative to the largest number of each output.

    Raises:
        VerificationError: the result cannot be opened or run, or its outputs are further from ``exact`` than
            ``FACTOR`` times those of ``baseline``.
    """
    truth = _tried("the dense model in float64", partial(_open_and_run, exact, feed))
    dense = _tried("the dense model", partial(_open_and_run, baseline, feed))
    results = []
    for how, kernels in ways:
        got = _tried(path.name, partial(_open_and_run, path, feed, kernels=kernels))
        results.append(Verified(how, max(_by_type(got, dense, truth), key=_share)))
    for result in results:
        if not result.closeness.ok:
            raise VerificationError(f"{path.name} differs from the dense model ({result.how}): {result.closeness}")
    return results


def _open_and_run(path: Path, feed: Feed, *, kernels: bool = True) -> Outputs:
    # Folding would keep an unpacked or float64 copy of every weight; as it is, one at a time is made and freed.
    return _run(open_session(path, kernels=kernels, fold_constants=False), feed)


def _tried(what: str, run: Callable[[], Outputs]) -> Outputs:
    try:
        return run()
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        raise VerificationError(f"{what} does not run: {' '.join(str(error).split())}") from error


def _run(session: Any, feed: Feed) -> Outputs:
    names = [output.name for output in session.get_outputs() if output.type.startswith("tensor(")]
    return dict(zip(names, session.run(names, feed), strict=True))


def _by_type(got: Outputs, dense: Outputs, truth: Outputs) -> list[Closeness]:
    """Compare the outputs of each float type together, every one divided by its largest number.

    Together, because the largest error of a single small output is a matter of luck on both sides; the largest over
    all of them is not. Where a model has no float outputs, the others must be the same. Where it has, they may differ:
    a class chosen between two almost equal numbers, and rightly so.
    """
    if any(got[name].shape != truth[name].shape or got[name].dtype != truth[name].dtype for name in truth):
        return [WRONG]
    floats = [name for name in truth if np.issubdtype(truth[name].dtype, np.floating)]
    if not floats:
        same = all(np.array_equal(got[name], dense[name]) for name in truth)
        return [Closeness(0.0, 0.0) if same else WRONG]
    results = []
    for dtype in {truth[name].dtype for name in floats}:
        sides: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for name in (name for name in floats if truth[name].dtype == dtype):
            finite = np.isfinite(truth[name]) & np.isfinite(dense[name])
            if not np.array_equal(got[name][~finite], dense[name][~finite], equal_nan=True):
                return [WRONG]
            exact = truth[name][finite]
            scale = float(np.abs(exact).max(initial=0)) or 1.0
            for side, outputs in zip(sides, (got, dense, truth), strict=True):
                side.append(outputs[name][finite] / dtype.type(scale))
        results.append(compare(*(torch.from_numpy(np.concatenate(side)) for side in sides), factor=FACTOR))
    return results


def _share(closeness: Closeness) -> float:
    if closeness.budget:
        return closeness.error / closeness.budget
    return float("inf") if closeness.error else 0.0
