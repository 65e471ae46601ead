"""Prove that a sparse ONNX model computes what the dense one with the same weights computes, with and without kernels.

There is no float64 form of an arbitrary ONNX model, so the truth is the dense model in which the linears that were
lowered run in float64: what was not touched is the same float32 on all three sides, and what is compared is what was
changed. The budget is the error of the same linears as plain float32 ops in ONNX Runtime.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import torch

from ..passes.equivalence import Closeness, compare
from ..passes.errors import VerificationError
from .feeds import Feed
from .session import open_session
from .verify import FACTOR, Verified


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
        For every way the output that came closest to its budget.

    Raises:
        VerificationError: an output is further from ``exact`` than ``FACTOR`` times ``baseline`` is.
    """
    truth = _run(_exact_session(exact), feed)
    dense = _run(open_session(baseline), feed)
    results = []
    for how, kernels in ways:
        got = _run(open_session(path, kernels=kernels), feed)
        # A class or a place chosen between two almost equal numbers may differ, and rightly so: where there are
        # floats, they decide.
        names = [name for name in truth if np.issubdtype(truth[name].dtype, np.floating)] or list(truth)
        closest = [_compare(got[name], dense[name], truth[name]) for name in names]
        results.append(Verified(how, max(closest, key=_share)))
    for result in results:
        if not result.closeness.ok:
            raise VerificationError(f"{path.name} differs from the dense model ({result.how}): {result.closeness}")
    return results


def _exact_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Folding would keep a float64 copy of every weight; as it is, one at a time is made and freed.
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def _run(session: Any, feed: Feed) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs() if output.type.startswith("tensor(")]
    return dict(zip(names, session.run(names, feed), strict=True))


def _compare(got: Any, dense: Any, truth: Any) -> Closeness:
    """Floats by their error; the same where the dense model gives no finite number, and for all other types."""
    if got.shape != truth.shape or got.dtype != truth.dtype:
        return Closeness(float("inf"), 0.0)
    if not np.issubdtype(truth.dtype, np.floating):
        return Closeness(0.0 if np.array_equal(got, dense) else float("inf"), 0.0)
    finite = np.isfinite(truth) & np.isfinite(dense)
    if not np.array_equal(got[~finite], dense[~finite], equal_nan=True):
        return Closeness(float("inf"), 0.0)
    sides = [torch.from_numpy(np.ascontiguousarray(x[finite])) for x in (got, dense, truth)]
    return compare(*sides, factor=FACTOR)


def _share(closeness: Closeness) -> float:
    return closeness.error / closeness.budget if closeness.budget else (float("inf") if closeness.error else 0.0)
