"""Prove that an exported file computes what the model computes: with our kernels, without them, and while decoding.

Two steps, each of which can fail: the graph that everything was made from must compute what the published model does
(published.py), and the file must compute what the graph does in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..passes.equivalence import Closeness, compare_outputs
from ..passes.errors import VerificationError
from ..passes.frontend.batches import Batch
from ..passes.frontend.trace import Traced
from ..passes.fx.partition import Partition
from ..passes.fx.run import run_part_float64, run_part_rounded
from .feeds import NUMPY
from .pieces import Piece, cut, run
from .published import DECODED, Published, counted
from .routing import Chosen, Route, Told, in_order, routing_of, same, telling
from .session import CausalSession, open_session

WAYS = MappingProxyType({"kernels": True, "functions": False})

Outputs = tuple[Tensor, ...]
Made = tuple[Outputs, Chosen]
"""What a run returned, and the experts that it chose; () where that is not told."""
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
        chosen: the experts of both runs where they are the same, see routing.py; None where they are not.
        follow: both again, with the experts of another run; None for models without experts.
        rankings: how many rankings choose experts; 0 for models without.
    """

    batch: Batch
    baseline: Outputs
    exact: Outputs
    rounded: bool
    cache: Outputs = ()
    chosen: Chosen | None = None
    follow: Callable[[Chosen], tuple[Route, Route]] | None = field(default=None, repr=False)
    rankings: int = 0


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
    routing = routing_of(partition)
    by_ops = partial(run_part_rounded, rounded=rounded, fast=False)
    for told in published:
        count, batch = len(told.outputs), told.batch
        exact = routing.run(params, batch, run_part_float64)
        unrounded = routing.run(params, batch, partial(run_part_rounded, rounded={}, fast=False))
        baseline = routing.run(params, batch, by_ops) if rounded else unrounded
        plain.append(unrounded.outputs[:count])
        cache = baseline.outputs[count:] if told.decoded is not None else ()

        def follow(chosen: Chosen, batch: Batch = batch) -> tuple[Route, Route]:
            return routing.run(params, batch, by_ops, chosen), routing.run(params, batch, run_part_float64, chosen)

        agreed = exact.chosen if same(exact.chosen, baseline.chosen, batch) else None
        own = (batch, baseline.outputs[:count], exact.outputs[:count], bool(rounded), cache)
        expected.append(Expected(*own, agreed, follow, routing.rankings))
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
    with telling(path, expected[0].rankings) as told:
        pieces = cut(told.path)
        for how, kernels in ways.items():
            if pieces and not kernels:
                results += _in_pieces(path, f"{how}, in {len(pieces)} pieces", pieces, told, traced, expected)
            else:
                results += _whole_file(path, how, kernels, told, traced, expected)
    for result in results:
        if not result.closeness.ok:
            raise VerificationError(f"{path.name} differs from the model ({result.how}): {result.closeness}")
    return results


def _whole_file(
    path: Path, how: str, kernels: bool, told: Told, traced: Traced, expected: Sequence[Expected]
) -> list[Verified]:
    """What `verify` finds in one way, of a file in one session."""
    session = open_session(told.path, kernels=kernels)
    whole = [_tried(path, how, partial(_whole, session, traced, told), each.batch) for each in expected]
    results = [Verified(how, _judged(path, how, whole, expected))]
    if traced.kind == "causal":
        if not told.names:
            CausalSession(session)  # refuses what is no decoder; a copy that tells more is one of our own files
        decoded = [_tried(path, how, partial(_decode, session, traced, told), each.batch) for each in expected]
        results.append(Verified(f"{how}, decoding", _judged(path, how, decoded, expected, last=DECODED)))
    return results


def _judged(
    path: Path, how: str, made: Sequence[Made], expected: Sequence[Expected], *, last: int | None = None
) -> Closeness:
    """How close a way of running the file came, where it chose experts: to what the model makes with the same ones.

    Raises:
        VerificationError: it chose experts that the model would not.
    """
    led = []
    for (_, chosen), each in zip(made, expected, strict=True):
        if not chosen or (each.chosen is not None and same(chosen, each.chosen, each.batch)):
            led.append(each)
            continue
        assert each.follow is not None
        baseline, exact = each.follow(chosen)
        order = in_order(exact, baseline, each.batch)
        if not order.ok:
            raise VerificationError(f"{path.name} chooses other experts than the model ({how}): by ranks, {order}")
        count = len(each.exact)
        led.append(replace(each, baseline=baseline.outputs[:count], exact=exact.outputs[:count]))
    return _closeness([outputs for outputs, _ in made], led, last=last)


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
    path: Path, how: str, pieces: Sequence[Piece], told: Told, traced: Traced, expected: Sequence[Expected]
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
        wanted = [*names, *told.names]
        made = [tuple(map(torch.from_numpy, found)) for found in run(pieces, [*whole, *steps], wanted, kernels=False)]
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        raise VerificationError(f"{path.name} does not run ({how}): {' '.join(str(error).split())}") from error
    found = [_made(each, told) for each in made]
    results = [Verified(how, _judged(path, how, found[: len(whole)], expected))]
    if steps:
        rest, decoded = iter(found[len(whole) :]), []
        for (_, chosen), each in zip(found, expected, strict=False):
            own = [next(rest) for _ in range(DECODED)]
            texts = len(each.batch.inputs[0])
            # The cache was the baseline's, so the experts of the tokens in front are those of the whole run.
            front = [x.reshape(texts, -1, *x.shape[1:])[:, :-DECODED].flatten(0, 1) for x in chosen]
            routes = _in_text_order([front, *(its for _, its in own)], texts) if chosen else ()
            decoded.append(((torch.cat([outputs[0] for outputs, _ in own], dim=1),), routes))
        results.append(Verified(f"{how}, decoding", _judged(path, how, decoded, expected, last=DECODED)))
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


def _tried(path: Path, how: str, run: Callable[[Batch], Made], batch: Batch) -> Made:
    try:
        return run(batch)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        shape = list(batch.inputs[0].shape)
        said = " ".join(str(error).split())
        raise VerificationError(f"{path.name} does not run ({how}) on inputs of shape {shape}: {said}") from error


def _whole(session: Any, traced: Traced, told: Told, batch: Batch) -> Made:
    """The float outputs of one run, of a decoder the logits, and the experts that it chose."""
    types = {value.name: NUMPY[value.type] for value in session.get_inputs()}
    feed: dict[str, Any] = {name: x.astype(types[name]) for name, x in _feed(traced, batch).items()}
    names = traced.outputs[:1] if traced.kind == "causal" else traced.outputs
    return _made([torch.from_numpy(x) for x in session.run([*names, *told.names], feed)], told)


def _made(results: Sequence[Tensor], told: Told) -> Made:
    """Results of a file in the order in which they were asked for: outputs, then what it chose."""
    count = len(results) - len(told.names)
    return tuple(x for x in results[:count] if x.is_floating_point()), tuple(results[count:])


def _feed(traced: Traced, batch: Batch) -> dict[str, Any]:
    """A batch by the names of the inputs, which are float32 in the file of a bfloat16 model."""
    wide = [x.float() if x.dtype == torch.bfloat16 else x for x in batch.inputs]
    return {name: x.numpy() for name, x in zip(traced.inputs, wide, strict=True)}


def _decode(session: Any, traced: Traced, told: Told, batch: Batch) -> Made:
    """Logits of the last tokens, each computed from the cache of those before it, and the experts of all tokens."""
    types = {value.name: NUMPY[value.type] for value in session.get_inputs()}
    feed = {name: x.astype(types[name]) for name, x in _feed(traced, batch).items()}
    ids, mask, *past = traced.inputs
    length = batch.inputs[0].shape[1]
    logits, chosen = [], []
    values = {name: feed[name] for name in past}
    begin = 0
    for end in range(length - DECODED, length + 1):
        own = {ids: feed[ids][:, begin:end], mask: feed[mask][:, :end], **values}
        first, *rest = session.run([*traced.outputs, *told.names], own)
        logits.append(torch.from_numpy(first))
        values = dict(zip(past, rest, strict=False))
        chosen.append([torch.from_numpy(x) for x in rest[len(past) :]])
        begin = end
    return (torch.cat(logits[1:], dim=1),), _in_text_order(chosen, len(batch.inputs[0]))


def _in_text_order(chosen: Sequence[Sequence[Tensor]], texts: int) -> Chosen:
    """What runs of some tokens each chose, ``[texts * tokens, ..]``, as one run of all tokens has it."""
    by_text = [[x.reshape(texts, -1, *x.shape[1:]) for x in step] for step in chosen]
    return tuple(torch.cat(steps, dim=1).flatten(0, 1) for steps in zip(*by_text, strict=True))


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
