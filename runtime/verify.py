"""Prove that an exported file computes what the model computes: with our kernels, without them, and while decoding.

Two steps, each of which can fail: the graph that everything was made from must compute what the published model does
(published.py), and the file must compute what the graph does in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..passes.equivalence import Closeness, compare_outputs
from ..passes.errors import VerificationError
from ..passes.frontend.batches import Batch
from ..passes.frontend.trace import Traced
from ..passes.fx.partition import Partition
from ..passes.fx.run import Values, live_after, run_part_float64, run_part_rounded, start
from .feeds import NUMPY
from .pieces import Piece, cut, run
from .published import DECODED, Published, counted
from .session import CausalSession, open_session

WAYS = MappingProxyType({"kernels": True, "functions": False})

Outputs = tuple[Tensor, ...]
Rounded = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Expected:
    """What the model returns for one batch, before it is lowered.

    Attributes:
        batch: the inputs.
        baseline: float outputs in float32, as torch computes them on rounded activations; a decoder's logits alone.
        exact: the same in float64, activations not rounded.
        rounded: whether activations are rounded.
        cache: the KV cache after the batch as ``baseline`` has it, by the order of the graph's outputs; () of others.
    """

    batch: Batch
    baseline: Outputs
    exact: Outputs
    rounded: bool
    cache: Outputs = ()


@dataclass(frozen=True)
class Verified:
    """One way of running the file, and how close it came, relative to the largest number of each output."""

    how: str
    closeness: Closeness


def expect(
    partition: Partition,
    params: Mapping[str, Tensor],
    published: Sequence[Published],
    rounded: Rounded = MappingProxyType({}),
) -> list[Expected]:
    """Run the partitioned graph in float32 and in float64, and compare it with the published model.

    Where ops round their activations (int8 and int4 weights: to 8 bits a token; bfloat16: to bfloat16), the float32 run
    does so too and thereby sets the budget, and the float64 run does not. Rounding in both would compare noise: an
    activation half-way between two codes falls to either side with the order of a sum, and what follows differs.

    Args:
        partition: the model.
        params: weights as the file will hold them: pruned, folded and rounded to their storage dtype.
        published: held-out inputs, and what the published model returns for them with the same weights.
        rounded: by the key of a weight, what its linear does to its activations first.

    Raises:
        VerificationError: the graph is not the model.
    """
    expected, plain = [], []
    for told in published:
        count = len(told.outputs)
        exact = _run(partition, params, told.batch, run_part_float64)[:count]
        unrounded = _run(partition, params, told.batch, partial(run_part_rounded, rounded={}, fast=False))
        by_ops = partial(run_part_rounded, rounded=rounded, fast=False)
        baseline = _run(partition, params, told.batch, by_ops) if rounded else unrounded
        plain.append(unrounded[:count])
        cache = baseline[count:] if told.decoded is not None else ()
        expected.append(Expected(told.batch, baseline[:count], exact, bool(rounded), cache))
    _check_graph(published, plain, [each.exact for each in expected])
    return expected


def verify(path: Path, traced: Traced, expected: Sequence[Expected], ways: Mapping[str, bool] = WAYS) -> list[Verified]:
    """Run the file with the kernels and with its own functions, whole and (causal models) token by token.

    Without the kernels a large file is run in pieces, see pieces.py.

    Args:
        path: the file.
        traced: the model.
        expected: what it returns for some batches.
        ways: what each way of running the file is called, and whether it is with our kernels.

    Raises:
        VerificationError: the file does not run, or is further from the truth than its budget, see ``compare_outputs``.
    """
    results: list[Verified] = []
    pieces = cut(path)
    for how, kernels in ways.items():
        if pieces and not kernels:
            results += _in_pieces(path, f"{how}, in {len(pieces)} pieces", pieces, traced, expected)
        else:
            results += _whole_file(path, how, kernels, traced, expected)
    for result in results:
        if not result.closeness.ok:
            raise VerificationError(f"{path.name} differs from the model ({result.how}): {result.closeness}")
    return results


def _whole_file(path: Path, how: str, kernels: bool, traced: Traced, expected: Sequence[Expected]) -> list[Verified]:
    """What `verify` finds in one way, of a file in one session."""
    session = open_session(path, kernels=kernels)
    whole = [_tried(path, how, partial(_whole, session, traced), each.batch) for each in expected]
    results = [Verified(how, _closeness(whole, expected))]
    if traced.kind == "causal":
        steps = CausalSession(session)
        decoded = [_tried(path, how, partial(_decode, steps), each.batch) for each in expected]
        results.append(Verified(f"{how}, decoding", _closeness(decoded, expected, last=DECODED)))
    return results


def _run(partition: Partition, params: Mapping[str, Tensor], batch: Batch, run: Callable[..., Values]) -> Outputs:
    """The float outputs."""
    values = start(partition, batch.inputs)
    for part, needed in zip(partition.parts, live_after(partition), strict=True):
        values.update(run(part, values, params, partition.params))
        for dead in [name for name in values if name not in needed and name not in partition.outputs]:
            del values[dead]
    return tuple(values[name] for name in partition.outputs if values[name].is_floating_point())


def _check_graph(published: Sequence[Published], plain: Sequence[Outputs], exact: Sequence[Outputs]) -> None:
    """Compare the traced graph with the published forward, and with the generation loop."""
    batches = [told.batch for told in published]
    sides = [[tuple(counted(x, b) for x in xs) for xs, b in zip(side, batches, strict=True)] for side in (plain, exact)]
    # A decoder's forward was asked for each text alone, so there is no padding left to leave out.
    own = [
        told.outputs if told.decoded is not None else tuple(counted(x, told.batch) for x in told.outputs)
        for told in published
    ]
    found = {"forward": compare_outputs(own, *sides)}
    loop = [(told.decoded,) for told in published if told.decoded is not None]
    if loop:
        tails = [[tuple(x[:, -DECODED - 1 : -1] for x in xs) for xs in side] for side in (plain, exact)]
        found["generation loop"] = compare_outputs(loop, *tails)
    for what, closeness in found.items():
        if not closeness.ok:
            raise VerificationError(f"the traced graph differs from the model's own {what}: {closeness}")


def _in_pieces(
    path: Path, how: str, pieces: Sequence[Piece], traced: Traced, expected: Sequence[Expected]
) -> list[Verified]:
    """What `verify` finds without our kernels, of a file in pieces.

    Every token is decoded from the cache that torch has in front of it, so that no step waits for the one before and
    each piece is opened once for all of them. That the file reads the cache that it wrote is known from its run with
    kernels, in which the same nodes do so.
    """
    names = traced.outputs[:1] if traced.kind == "causal" else traced.outputs
    whole = [_feed(traced, each.batch) for each in expected]
    steps = [step for feed, each in zip(whole, expected, strict=True) for step in _steps(traced, feed, each)]
    try:
        made = [tuple(map(torch.from_numpy, found)) for found in run(pieces, [*whole, *steps], names, kernels=False)]
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        raise VerificationError(f"{path.name} does not run ({how}): {' '.join(str(error).split())}") from error
    floats = [tuple(x for x in found if x.is_floating_point()) for found in made]
    results = [Verified(how, _closeness(floats[: len(whole)], expected))]
    if steps:
        rest = iter(floats[len(whole) :])
        decoded = [(torch.cat([next(rest)[0] for _ in range(DECODED)], dim=1),) for _ in expected]
        results.append(Verified(f"{how}, decoding", _closeness(decoded, expected, last=DECODED)))
    return results


def _steps(traced: Traced, feed: Mapping[str, Any], each: Expected) -> list[dict[str, Any]]:
    """The last tokens of a decoder's texts, one a feed, with the cache in front of it; nothing of other models."""
    if traced.kind != "causal":
        return []
    ids, mask, *past = traced.inputs
    length = feed[ids].shape[1]
    return [
        {ids: feed[ids][:, end - 1 : end], mask: feed[mask][:, :end]}
        | {name: x[:, :, : end - 1].float().numpy() for name, x in zip(past, each.cache, strict=True)}
        for end in range(length - DECODED + 1, length + 1)
    ]


def _tried(path: Path, how: str, run: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
    try:
        return run(batch)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        shape = list(batch.inputs[0].shape)
        said = " ".join(str(error).split())
        raise VerificationError(f"{path.name} does not run ({how}) on inputs of shape {shape}: {said}") from error


def _whole(session: Any, traced: Traced, batch: Batch) -> Outputs:
    """The float outputs of one run, of a decoder the logits."""
    types = {value.name: NUMPY[value.type] for value in session.get_inputs()}
    feed: dict[str, Any] = {name: x.astype(types[name]) for name, x in _feed(traced, batch).items()}
    names = traced.outputs[:1] if traced.kind == "causal" else traced.outputs
    outputs = [torch.from_numpy(x) for x in session.run(list(names), feed)]
    return tuple(x for x in outputs if x.is_floating_point())


def _feed(traced: Traced, batch: Batch) -> dict[str, Any]:
    """A batch by the names of the inputs, which are float32 in the file of a bfloat16 model."""
    wide = [x.float() if x.dtype == torch.bfloat16 else x for x in batch.inputs]
    return {name: x.numpy() for name, x in zip(traced.inputs, wide, strict=True)}


def _decode(session: CausalSession, batch: Batch) -> Outputs:
    """Logits of the last tokens, each computed from the cache of those before it."""
    ids, mask = (x.numpy() for x in batch.inputs[:2])
    first = ids.shape[1] - DECODED
    logits, past = session.step(ids[:, :first], mask[:, :first], session.empty_past(len(ids)))
    steps = []
    for end in range(first + 1, ids.shape[1] + 1):
        logits, past = session.step(ids[:, end - 1 : end], mask[:, :end], past)
        steps.append(logits)
    return (torch.from_numpy(np.concatenate(steps, axis=1)),)


def _closeness(got: Sequence[Outputs], expected: Sequence[Expected], *, last: int | None = None) -> Closeness:
    """All batches together; of every text the last tokens only, where ``last`` says how many."""

    def part(outputs: Outputs, batch: Batch) -> Outputs:
        if last is not None:
            return tuple(x[:, -last:] for x in outputs)
        return tuple(counted(x, batch) for x in outputs)

    batches = [each.batch for each in expected]
    sides = ([each.baseline for each in expected], [each.exact for each in expected])
    own = [part(xs, b) for xs, b in zip(got, batches, strict=True)]
    baseline, exact = ([part(xs, b) for xs, b in zip(side, batches, strict=True)] for side in sides)
    return compare_outputs(own, baseline, exact, rounded=expected[0].rounded)
