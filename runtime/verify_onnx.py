"""Prove that a sparse ONNX model computes what the dense one with the same weights computes, with and without kernels.

There is no float64 form of an arbitrary ONNX model, so the truth is the dense model in which the linears that were
lowered run in float64: what was not touched is the same float32 on all three sides, and what is compared is what was
changed. The budget is the error of the same linears as plain float32 ops in ONNX Runtime.

Every lowered linear is also compared by itself, on inputs of its own: where a model's rounding drowns its outputs, or
its inputs keep a linear from mattering, the outputs prove nothing about it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch

from ..passes.equivalence import Closeness, compare_model, compare_unproven
from ..passes.errors import VerificationError
from . import library_path
from .child import Job, run_all
from .feeds import Feed
from .verify import Verified

Outputs: TypeAlias = Mapping[str, Any]
WRONG = Closeness(float("inf"), 0.0)
TOKENS = 8
"""How many tokens every linear is given by itself."""


@dataclass(frozen=True)
class Sides:
    """The same thing three times.

    Attributes:
        result: the sparse form.
        baseline: the dense form with the weights of the result.
        exact: the same, what was lowered in float64.
        silent: ``baseline`` with zeros for all that was lowered, or None: outputs that stay the same prove nothing.
    """

    result: Path
    baseline: Path
    exact: Path
    silent: Path | None = None


def verify_onnx(
    name: str,
    whole: Sides,
    linears: Sides | None,
    feeds: Sequence[Feed],
    *,
    ways: Sequence[tuple[str, bool]],
    same_way: bool = False,
) -> list[Verified]:
    """Run the result and compare every output; then every lowered linear.

    Where the dense model's own rounding (of activations to 8 bits, layer after layer) moves its outputs by more than
    any wrong result may, the outputs prove nothing and that is said; then the linears are the proof.

    Args:
        name: what the result is called.
        whole: the models.
        linears: models of the linears alone (passes/onnx/alone.py); None where nothing was lowered.
        feeds: the inputs.
        ways: name, and whether our kernels run.
        same_way: run the dense sides as the result, with our kernels or without: for a model that has our ops already.

    Returns:
        The error and the budget of every way, relative to the largest number of each output.

    Raises:
        VerificationError: the result cannot be opened or run, is further from ``exact`` than ``compare_model`` allows,
            or returns nothing that can be compared.
    """
    results, remark = _judge(name, _run(whole, feeds, ways, same_way=same_way), _by_type)
    if linears is not None:
        alone = _run(linears, [_numbers(linears.result)], [(f"{how}, each linear", on) for how, on in ways])
        results += [Verified(x.how + remark, x.closeness) for x in _judge(name, alone, _by_linear, drown=False)[0]]
    elif remark:
        raise VerificationError(f"{name} cannot be compared{remark}")
    for result in results:
        if result.closeness.error == float("inf"):
            raise VerificationError(
                f"{name} returns NaN or infinity, or another shape, where the dense model does not ({result.how})"
            )
        if not result.closeness.ok:
            raise VerificationError(f"{name} differs from the dense model ({result.how}): {result.closeness}")
    return results


Runs: TypeAlias = Sequence[Outputs | str]
"""What came of every feed."""
Comparison: TypeAlias = Callable[[Outputs, Outputs, Outputs | None], list[Closeness]]


@dataclass(frozen=True)
class Way:
    """One way of running the result, and what it is compared with.

    Attributes:
        how: what it is called.
        got: of the result.
        optimised: of the result as a user opens it, with all of ONNX Runtime's optimisations.
        dense: of the baseline.
        truth: of the exact form.
        silent: of the silent form, or None.
    """

    how: str
    got: Runs
    optimised: Runs
    dense: Runs
    truth: Runs
    silent: Runs | None


def _run(sides: Sides, feeds: Sequence[Feed], ways: Sequence[tuple[str, bool]], *, same_way: bool = False) -> list[Way]:
    """Run every side on every feed; what several ways have in common is run once."""
    library = str(library_path())
    jobs = []
    for _, kernels in ways:
        own, theirs = (library if on else "" for on in (kernels, kernels or not same_way))
        result = Job(str(sides.result), own)
        # Optimised not for its numbers: some models do not survive it. Once, as without kernels it unpacks everything.
        optimised = Job(str(sides.result), library if ways[0][1] else "", optimise=True)
        dense = [Job(str(side), theirs) for side in (sides.baseline, sides.exact)]
        silent = [Job(str(sides.silent), library)] if sides.silent is not None else []
        jobs.append([result, optimised, *dense, *silent])
    every = list(dict.fromkeys(job for group in jobs for job in group))
    with tempfile.TemporaryDirectory(dir=sides.baseline.parent) as folder:
        outcome = dict(zip(every, run_all(every, feeds, Path(folder)), strict=True))
    taken = []
    for (how, _), group in zip(ways, jobs, strict=True):
        got, optimised_, dense_, truth, *rest = (outcome[job] for job in group)
        taken.append(Way(how, got, optimised_, dense_, truth, rest[0] if rest else None))
    return taken


def _judge(name: str, ways: Sequence[Way], comparison: Comparison, *, drown: bool = True) -> tuple[list[Verified], str]:
    """The result of every way; and a remark where these outputs are not all of the proof.

    Args:
        name: what the result is called.
        ways: what came out.
        comparison: of one feed.
        drown: leave out a feed on which the dense model is further from the truth than any result may be.
    """
    results: list[Verified] = []
    remark = ""
    for way in ways:
        if way.silent is not None and not _matters(way, comparison):
            remark = " (on these inputs the outputs do not depend on what was lowered, so they prove nothing)"
        found: list[Closeness] = []
        unproven = ""
        for got, optimised, dense, exact in zip(way.got, way.optimised, way.dense, way.truth, strict=True):
            if isinstance(dense, str):
                raise VerificationError(f"the dense model does not run: {dense}")
            if isinstance(got, str):
                raise VerificationError(f"{name} does not run ({way.how}): {got}")
            if isinstance(optimised, str):
                raise VerificationError(f"{name} does not run with all optimisations of ONNX Runtime: {optimised}")
            if isinstance(exact, str):
                unproven = f", against float32, as float64 does not run: {exact[:80]}"
                found += comparison(got, dense, None)
                continue
            moved = max(comparison(dense, dense, exact), key=_share, default=Closeness(0.0, 0.0))
            if moved.ok or not drown:
                found += comparison(got, dense, exact)
            else:
                remark = f" (its rounding alone moves the outputs by {moved.error:.0%}, so they prove nothing)"
        if not found and not remark:
            raise VerificationError(f"{name} returns no finite number that could be compared ({way.how})")
        if found:
            results.append(Verified(way.how + unproven, max(found, key=_share)))
    return results, remark


def _matters(way: Way, comparison: Comparison) -> bool:
    """Whether on any feed zeros for what was lowered would have been noticed."""
    for silent, dense, exact in zip(way.silent or (), way.dense, way.truth, strict=True):
        if isinstance(silent, str) or isinstance(dense, str):
            return True  # it cannot be told; what does not run is reported elsewhere
        found = comparison(silent, dense, None if isinstance(exact, str) else exact)
        if any(not closeness.ok for closeness in found):
            return True
    return False


def _by_type(got: Outputs, dense: Outputs, truth: Outputs | None) -> list[Closeness]:
    """Compare the outputs of each float type together, every one divided by its largest number.

    Together, because the largest error of a single small output is a matter of luck on both sides; the largest over
    all of them is not. Where a model has no float outputs, the others must be the same. Where it has, they may differ:
    a class chosen between two almost equal numbers, and rightly so. Nothing comes back where no number is finite.
    """
    other = dense if truth is None else truth
    if any(got[name].shape != other[name].shape or got[name].dtype != other[name].dtype for name in other):
        return [WRONG]
    floats = [name for name in other if np.issubdtype(other[name].dtype, np.floating)]
    if not floats:
        same = all(np.array_equal(got[name], dense[name]) for name in other)
        return [Closeness(0.0, 0.0) if same else WRONG] if other else []
    results = []
    for dtype in {other[name].dtype for name in floats}:
        sides: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for name in (name for name in floats if other[name].dtype == dtype):
            finite = np.isfinite(other[name]) & np.isfinite(dense[name])
            if not np.array_equal(got[name][~finite], dense[name][~finite], equal_nan=True):
                return [WRONG]
            scale = float(np.abs(other[name][finite]).max(initial=0)) or 1.0
            for side, outputs in zip(sides, (got, dense, other), strict=True):
                side.append(torch.from_numpy(outputs[name][finite] / dtype.type(scale)))
        one, base, exact = (torch.cat(side) for side in sides)
        if one.numel():
            results.append(compare_unproven(one, base) if truth is None else compare_model(one, base, exact))
    return results


def _by_linear(got: Outputs, dense: Outputs, truth: Outputs | None) -> list[Closeness]:
    """Compare every output by itself, divided by its largest number."""
    return [
        closeness
        for name in dense
        for closeness in _by_type(
            {name: got[name]}, {name: dense[name]}, None if truth is None else {name: truth[name]}
        )
    ]


def _numbers(path: Path) -> Feed:
    """Normal random numbers for the inputs of ``passes.onnx.alone.alone``, the same at every call."""
    rng = np.random.default_rng(0)
    graph = onnx.load(str(path), load_external_data=False).graph
    widths = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in graph.input}
    return {name: rng.standard_normal((TOKENS, width), np.float32) for name, width in widths.items()}


def _share(closeness: Closeness) -> float:
    if closeness.budget:
        return closeness.error / closeness.budget
    return float("inf") if closeness.error else 0.0
